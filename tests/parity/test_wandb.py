"""Weights & Biases, offline: what it stores of a run, read from its own file."""

import dataclasses
import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tiny_run import FLAGS, make_dataset

from train.config import TrainConfig
from train.loggers import WANDB_ID, extra_loggers, numbers
from train.loop import train as run_training
from train.manifest import Manifest

pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("quick_compilation")

BLOCK = 32768


def stored(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a log of LevelDB's after a header of seven bytes."""
    content, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # no header fits into the rest of the block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_run_and_its_continuation_are_one_run_there(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    data = Manifest.read(make_dataset(tmp_path / "data") / "tiny")
    short = {**FLAGS, "max_iters": 4, "eval_interval": 2, "eval_iters": 1}
    config = TrainConfig(**short, out_dir=str(tmp_path / "run"), wandb_log=True)
    run_training(config, data)
    run_training(dataclasses.replace(config, max_iters=6), data, resume=True)

    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    found, runs, settings = {}, [], {}
    for path in files:
        for content in stored(path):
            record = Record.FromString(content)
            if record.HasField("run"):
                runs.append((record.run.run_id, record.run.project, record.run.display_name))
                settings |= {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            if record.HasField("history"):
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                found.setdefault(row.pop("_step"), {}).update(row)
    identity = (tmp_path / "run" / "wandb_id").read_text().strip()
    assert set(runs) == {(identity, "eqx_gpt", "run")}
    assert (settings["n_embd"], settings["max_iters"], settings["n_params"]) == (14, 6, 3136)

    expected: dict[int, dict[str, float]] = {}
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        expected.setdefault(record["iter"], {}).update(numbers(record))
    assert found.keys() == expected.keys() == set(range(7))
    for step, row in expected.items():
        for name, value in row.items():
            assert found[step][name] == pytest.approx(value), (step, name)


def test_a_new_run_is_another_run_there(tmp_path: Path) -> None:
    (tmp_path / WANDB_ID).write_text("of-one-that-saved-nothing\n")
    config = TrainConfig(out_dir=str(tmp_path), wandb_log=True)
    with ExitStack() as closing:
        extra_loggers(config, 7, resumed=False, closing=closing)
    assert (tmp_path / WANDB_ID).read_text() != "of-one-that-saved-nothing\n"
