"""A run directory explains itself: what is in it, when a run may start there or go on there.

run.json              the resolved config, the model, its adapters, the data's manifest, hashes of
                      these, the preset that was named, what the data's tokens say of it (see
                      token_statistics.py), the processes that trained it (see provenance.py)
tokenizer_spec.json   the tokenizer, whole
metrics.jsonl         one object a logged step and one an evaluation
checkpoints/, best/   see checkpoint.py; so base/ and before/
loss.png              where matplotlib is installed
samples.jsonl         samples of text, where sample_interval asks for them
report.html           all of it on one page
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eqx_gpt.config import GPTConfig
from eqx_gpt.record import FORMAT_VERSION, conflict, digests
from train.config import TrainConfig, with_fields
from train.files import write_atomically
from train.manifest import Manifest
from train.token_statistics import token_statistics

# A run that goes on with another value of these would not be the same run.
_FIXED = (
    "seed", "dataset", "batch_size", "gradient_accumulation_steps", "block_size", "n_layer",
    "n_head", "n_embd", "dropout", "attention_dropout", "bias", "vocab_size", "precision",
    "init_from", "lora_rank", "lora_alpha", "lora_targets", "freeze", "position", "rope_theta",
    "norm", "activation", "mlp", "n_inner", "n_kv_head", "qk_norm", "head", "logit_softcap",
    "zero_init", "optimizer", "moment_dtype", "z_loss", "label_smoothing", "ema_decay",
)  # fmt: skip


class RunError(ValueError):
    """A run directory that cannot be used as asked; the message says what to do."""


def has_run(directory: str | Path) -> bool:
    return (Path(directory) / "run.json").exists()


def has_checkpoint(directory: str | Path) -> bool:
    """Is there anything to resume from?"""
    return bool(steps_on_disk(Path(directory) / "checkpoints"))


def steps_on_disk(directory: Path) -> list[int]:
    """The whole ones: a step gets its number last."""
    if not directory.is_dir():
        return []
    return [int(path.name) for path in directory.iterdir() if path.name.isdecimal()]


def read_run(directory: str | Path) -> dict[str, Any]:
    """The content of run.json. RunError if it is missing, damaged or of another format."""
    path = Path(directory) / "run.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        near = sorted(str(p.parent) for p in Path(directory).parent.glob("*/run.json"))
        there = f"; runs beside it: {', '.join(near)}" if near else ""
        raise RunError(
            f"no run to resume in {str(directory)!r} ({path.name} not found){there}; give its "
            "--out_dir, or start one without --init_from resume"
        ) from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from None
    if problem := conflict(content):
        raise RunError(f"{path}: {problem}")
    missing = [key for key in ("config", "model", "data") if not isinstance(content.get(key), dict)]
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}; it was not written by a run")
    return content


def run_config(directory: str | Path) -> TrainConfig:
    """The config that a run recorded."""
    fields = read_run(directory)["config"]
    return with_fields(TrainConfig(), fields, str(Path(directory) / "run.json"))


def check_startable(directory: str | Path) -> None:
    """RunError if the directory holds a run to lose."""
    if has_checkpoint(directory):
        raise RunError(
            f"{str(directory)!r} already holds a run; go on with --init_from resume "
            f"--out_dir {directory}, or give another --out_dir"
        )
    if step := max(steps_on_disk(Path(directory) / "best"), default=0):
        raise RunError(
            f"{str(directory)!r} holds the best model, of step {step}, of a run without "
            "checkpoints; give another --out_dir, or begin that run anew with --init_from resume "
            f"--out_dir {directory}, which puts the model aside"
        )


def write_run(
    config: TrainConfig,
    model: GPTConfig,
    data: Manifest,
    preset: str | None = None,
    *,
    resumed: bool = False,
) -> None:
    """Write run.json and the tokenizer. RunError if the directory cannot be written.

    `preset` is the name of the recipe that the settings are made from; a run that goes on keeps
    its own.
    """
    directory = Path(config.out_dir)
    before: Mapping[str, Any] = {}
    if (resumed or has_checkpoint(directory)) and has_run(directory):
        before = read_run(directory)
    content = {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "model": model.to_dict(),
        "lora": None if config.lora is None else dataclasses.asdict(config.lora),
        "data": data.to_dict(),
    }
    content |= {
        "sha256": digests(content),
        "preset": before.get("preset", preset),
        "statistics": before.get("statistics")
        or token_statistics(data.tokens("train"), data.tokens("val")).to_dict(),
        "processes": before.get("processes", []),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "tokenizer_spec.json", data.tokenizer_spec)
        _write(directory / "run.json", content)
    except OSError as error:
        raise RunError(f"cannot write to {config.out_dir!r}: {error.strerror}") from None


def resumed_model(config: TrainConfig, data: Manifest) -> GPTConfig:
    """The run's model, once nothing that decides its losses differs. RunError with both sides."""
    content = read_run(config.out_dir)
    recorded = run_config(config.out_dir)
    conflicts = [
        f"{name} was {getattr(recorded, name)!r}, now {getattr(config, name)!r}"
        for name in _FIXED
        if getattr(recorded, name) != getattr(config, name)
    ]
    conflicts += _data_conflicts(content["data"], data)
    if conflicts:
        raise RunError(
            f"cannot resume {config.out_dir!r}: {'; '.join(conflicts)}. Leave these as they were, "
            f"or start a new run from its weights with --init_from {config.out_dir}"
        )
    return dataclasses.replace(GPTConfig.from_dict(content["model"]), remat=config.remat)


def check_own_data(directory: str | Path | None, data: Manifest) -> None:
    """RunError, with both sides, if the run in `directory`, if any, was trained on other data."""
    conflicts = [] if directory is None else _data_conflicts(read_run(directory)["data"], data)
    if conflicts:
        raise RunError(
            f"{str(data.directory)!r} is not what the run in {str(directory)!r} was trained on: "
            f"{'; '.join(conflicts)}. To take what is there now, give --dataset {data.name}"
        )


def _data_conflicts(was: Mapping[str, Any], data: Manifest) -> list[str]:
    """In what a dataset differs from the manifest that a run recorded."""
    found = data.to_dict()
    conflicts = []
    if (then := was["tokenizer_fingerprint"]) != (now := data.tokenizer_fingerprint):
        conflicts.append(
            f"the tokenizer of dataset {data.name!r} had fingerprint {then[:12]}..., now "
            f"{now[:12]}..."
        )
    for split, before in was["splits"].items():
        after = found["splits"][split]
        if after["sha256"] != before["sha256"]:
            conflicts.append(
                f"{split} split of dataset {data.name!r} had sha256 {before['sha256'][:12]}..., "
                f"now {after['sha256'][:12]}..."
            )
        elif after.get("flags") != before.get("flags"):
            conflicts.append(f"{split} split of dataset {data.name!r} had other answers to learn")
    return conflicts


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
