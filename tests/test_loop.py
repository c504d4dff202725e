"""Whole runs in this process: what they write, how they resume, what they refuse."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import FLAGS, StopAfter, losses, make_dataset

import train.loop
from eqx_gpt.tree import named_arrays
from train.config import TrainConfig
from train.loop import train as run_training
from train.manifest import Manifest
from train.metrics import MetricsFile
from train.run import RunError, read_run, run_config
from weights import from_pretrained, load_tokenizer


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(data_dir):
    return Manifest.read(data_dir / "tiny")


@pytest.fixture(scope="module")
def config(data_dir):
    return TrainConfig(**FLAGS, data_dir=str(data_dir))


@pytest.fixture(scope="module")
def straight(config, data, tmp_path_factory):
    """A run without interruption."""
    out_dir = tmp_path_factory.mktemp("runs") / "straight"
    run_training(dataclasses.replace(config, out_dir=str(out_dir)), data)
    return out_dir


def interrupted(monkeypatch, looks, *args, **kwargs):
    monkeypatch.setattr(train.loop, "Interruption", lambda *_: StopAfter(looks))
    outcome = run_training(*args, **kwargs)
    monkeypatch.undo()
    return outcome


def test_a_run_directory_explains_itself(straight, config, data):
    content = read_run(straight)
    assert content["config"]["n_embd"] == 14
    assert content["data"] == data.to_dict()
    assert content["model"]["vocab_size"] == data.vocab_size
    assert run_config(straight) == dataclasses.replace(config, out_dir=str(straight))
    assert not (straight / "config.json").exists()  # nobody takes it for a Hugging Face model
    assert load_tokenizer(straight).encode("Jack") == data.tokenizer().encode("Jack")
    assert (straight / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_every_step_and_evaluation(straight):
    found = losses(straight)
    assert [i for kind, i in found if kind == "train_loss"] == list(range(30))
    assert [i for kind, i in found if kind == "val_loss"] == [10, 20, 30]
    lines = (straight / "metrics.jsonl").read_text().splitlines()
    step = next(r for r in map(json.loads, lines) if "train_loss" in r)
    assert {"iter", "train_loss", "lr", "tokens_per_s", "mfu", "elapsed_s"} <= set(step)
    assert step["dataset"] == "tiny"
    elapsed = [json.loads(line)["elapsed_s"] for line in lines]
    assert elapsed == sorted(elapsed)
    assert found["train_loss", 29] < found["train_loss", 0] - 0.5


@pytest.mark.parametrize("looks", [0, 7, 12, 13, 14, 25])
def test_an_interrupted_run_goes_on_exactly(looks, straight, config, data, tmp_path, monkeypatch):
    """The looks fall before the first step, between steps and within evaluations."""
    config = dataclasses.replace(config, out_dir=str(tmp_path / "run"))
    outcome = interrupted(monkeypatch, looks, config, data)
    assert outcome.interrupted_by == "SIGINT"
    assert outcome.steps_done < 30
    assert (tmp_path / "run" / "checkpoints" / "0").exists() is False
    outcome = run_training(config, data, resume=True)
    assert (outcome.steps_done, outcome.interrupted_by) == (30, None)
    assert losses(tmp_path / "run") == losses(straight)
    a, b = from_pretrained(tmp_path / "run"), from_pretrained(straight)
    for (name, x), y in zip(named_arrays(a).items(), named_arrays(b).values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("looks", [1, 4, 16])
def test_accumulation_from_the_host_is_interrupted_between_micro_batches(
    looks, config, data, tmp_path, monkeypatch
):
    config = dataclasses.replace(
        config, gradient_accumulation_steps=3, micro_batch_size=config.batch_size, max_iters=6
    )
    long = {"float32": 1.0, "bfloat16": 1.0}  # as if a micro-batch took long
    with pytest.MonkeyPatch.context() as slow:
        slow.setattr("train.devices._CPU_FLOPS", long)
        for name, stop_after in (("straight", 10**9), ("stopped", looks)):
            config = dataclasses.replace(config, out_dir=str(tmp_path / name))
            outcome = interrupted(monkeypatch, stop_after, config, data)
        assert outcome.interrupted_by == "SIGINT"
        assert outcome.steps_done == looks // 3  # a look before the step, and two within it
        run_training(config, data, resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


@pytest.mark.parametrize("max_iters", [30, 12])
def test_a_finished_run_says_so_and_stays_as_it_is(max_iters, straight, config, data):
    before = {path: path.read_bytes() for path in straight.iterdir() if path.is_file()}
    config = dataclasses.replace(config, out_dir=str(straight), max_iters=max_iters)
    with pytest.raises(RunError, match=f"has done 30 steps of max_iters={max_iters}"):
        run_training(config, data, resume=True)
    assert {path: path.read_bytes() for path in straight.iterdir() if path.is_file()} == before


def test_a_look_at_a_run_changes_nothing_of_it(straight, config, data):
    before = {name: (straight / name).read_bytes() for name in ("run.json", "metrics.jsonl")}
    config = dataclasses.replace(config, out_dir=str(straight), eval_only=True)
    outcome = run_training(config, data, resume=True)
    assert outcome.val_loss == pytest.approx(losses(straight)["val_loss", 30], rel=1e-6)
    assert {name: (straight / name).read_bytes() for name in before} == before


def test_an_evaluation_is_done_again_after_a_kill_behind_the_best(config, data, tmp_path):
    """The best model of a step may be on disk before the checkpoint of that step."""
    config = dataclasses.replace(
        config, out_dir=str(tmp_path), always_save_checkpoint=False, max_iters=20,
        checkpoint_interval=7,
    )  # fmt: skip
    run_training(config, data)
    before = losses(tmp_path)
    for _ in range(2):
        shutil.rmtree(tmp_path / "checkpoints" / "20")
        run_training(config, data, resume=True)
        assert losses(tmp_path) == before


def test_more_steps_may_be_asked_for(straight, config, data, tmp_path):
    config = dataclasses.replace(config, out_dir=str(tmp_path), max_iters=10)
    run_training(config, data)
    run_training(dataclasses.replace(config, max_iters=12), data, resume=True)
    assert len([1 for kind, _ in losses(tmp_path) if kind == "train_loss"]) == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 7}, "seed was 1337, now 7"),
        ({"n_embd": 16, "batch_size": 4}, r"batch_size was 3, now 4; n_embd was 14, now 16"),
    ],
)
def test_what_would_change_the_run_is_refused(change, words, straight, config, data):
    config = dataclasses.replace(config, out_dir=str(straight), **change)
    with pytest.raises(RunError, match=words):
        run_training(config, data, resume=True)


def test_other_data_of_the_same_name_is_refused(straight, config, data):
    split = dataclasses.replace(data.splits["train"], sha256="0" * 64)
    other = dataclasses.replace(data, splits={**data.splits, "train": split})
    config = dataclasses.replace(config, out_dir=str(straight))
    with pytest.raises(RunError, match=r"train split of dataset 'tiny' had sha256 .* now 000000"):
        run_training(config, other, resume=True)


def test_a_run_is_never_written_over(straight, config, data):
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="already holds a run; go on with --init_from resume"):
        run_training(dataclasses.replace(config, out_dir=str(straight)), data)
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume_names_the_runs_nearby(straight, config, data):
    config = dataclasses.replace(config, out_dir=str(straight.parent / "other"))
    with pytest.raises(RunError, match=r"no run to resume .*straight"):
        run_training(config, data, resume=True)


def test_the_best_evaluation_is_kept_and_used(config, data, tmp_path):
    config = dataclasses.replace(
        config, out_dir=str(tmp_path), always_save_checkpoint=False, learning_rate=0.05
    )
    run_training(config, data)
    val = {i: loss for (kind, i), loss in losses(tmp_path).items() if kind == "val_loss"}
    best = min(val, key=lambda i: val[i])
    assert [path.name for path in (tmp_path / "best").iterdir()] == [str(best)]


@pytest.mark.parametrize("freeze", ["", "wte.*"])
def test_a_best_model_without_checkpoints_is_put_aside(
    freeze, config, data, tmp_path, monkeypatch, capsys
):
    """Whoever removed the checkpoints to have their room did not mean it; nor does a kill
    between two renames lose anything."""
    run = tmp_path / "run"
    config = dataclasses.replace(
        config, out_dir=str(run), always_save_checkpoint=False, freeze=freeze
    )
    run_training(config, data)
    best, whole = named_arrays(from_pretrained(run)), Path.rename
    metrics = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match=r"holds the best model, of step .* another --out_dir"):
        run_training(config, data)

    def rename(self, target):
        if self.name == "best":
            raise KeyboardInterrupt
        return whole(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            run_training(config, data, resume=True)
    run_training(config, data, resume=True)
    assert f"which is now in {run / 'before'}" in capsys.readouterr().err
    assert (run / "before" / "metrics.jsonl").read_text() == metrics
    kept = named_arrays(from_pretrained(run / "before"))
    assert kept.keys() == best.keys()
    for name, x in best.items():
        np.testing.assert_array_equal(kept[name], x, err_msg=name)

    shutil.rmtree(run / "checkpoints")
    run_training(config, data, resume=True)  # which makes the same model again
    assert not (run / "before1").exists()


def test_training_starts_from_another_model(straight, config, data, tmp_path):
    pretrained = from_pretrained(straight)
    config = dataclasses.replace(
        config, out_dir=str(tmp_path), init_from=str(straight), max_iters=1, learning_rate=0.0,
        decay_lr=False, dropout=0.0, block_size=11,
    )  # fmt: skip
    run_training(config, data, pretrained=lambda: pretrained)
    found = from_pretrained(tmp_path)
    assert found.config.block_size == 11  # and the table of positions ends there
    jax.tree.map(np.testing.assert_array_equal, *map(named_arrays, (
        pretrained.crop_block_size(11), found)))  # fmt: skip
    with pytest.raises(ValueError, match="block_size=14 exceeds the 13"):
        run_training(
            dataclasses.replace(config, block_size=14, out_dir=str(tmp_path / "b")),
            data,
            pretrained=lambda: pretrained,
        )


def test_eval_only_trains_nothing(config, data, tmp_path):
    config = dataclasses.replace(config, out_dir=str(tmp_path), eval_only=True)
    outcome = run_training(config, data)
    assert outcome.steps_done == 0
    assert outcome.val_loss == pytest.approx(np.log(data.vocab_size), abs=0.1)
    assert losses(tmp_path).keys() == {("val_loss", 0)}


def test_samples_are_shown_when_asked_for(config, data, tmp_path, capsys):
    config = dataclasses.replace(config, out_dir=str(tmp_path), max_iters=4, sample_interval=2)
    run_training(config, data)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("sample at ") == 2


def test_metrics_of_steps_to_be_done_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"iter": 0, "train_loss": 4.0},
        {"iter": 1, "train_loss": 3.0},
        {"iter": 2, "val_loss": 3.5},
        {"iter": 2, "train_loss": 2.0},
        {"iter": 3, "val_loss": 2.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + '{"iter": 1, "train_lo')
    MetricsFile(path, steps_done=2, evaluated_at=2).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]


def test_tensorboard_gets_the_numbers(config, data, tmp_path):
    config = dataclasses.replace(config, out_dir=str(tmp_path), max_iters=3, tensorboard_log=True)
    run_training(config, data)
    assert list((tmp_path / "tensorboard").glob("events*"))
