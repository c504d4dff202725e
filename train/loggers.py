"""Where else the numbers of a run go: Weights & Biases and TensorBoard."""

import dataclasses
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from train.config import TrainConfig

Logger = Callable[[dict[str, Any]], None]

WANDB_ID = "wandb_id"
"""The file in a run directory that makes a resumed run the same run there."""


def extra_loggers(
    config: TrainConfig, n_params: int, *, resumed: bool, closing: ExitStack
) -> list[Logger]:
    """Those that are asked for; `closing` ends them.

    A logger takes a record of metrics.jsonl: `iter`, and what there is to log at that step.

    **Raises:** ValueError for one that is not installed or cannot start.
    """
    loggers: list[Logger] = []
    if config.wandb_log:
        loggers.append(_wandb(config, n_params, resumed, closing))
    if config.tensorboard_log:
        loggers.append(_tensorboard(config, closing))
    return loggers


def numbers(record: Mapping[str, Any]) -> dict[str, int | float]:
    """What a curve can be drawn of: finite numbers, those within objects as `outer/inner`."""
    return dict(_numbers(record, ""))


def _numbers(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, int | float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif (
            isinstance(value, int | float) and math.isfinite(value) and f"{prefix}{name}" != "iter"
        ):
            yield f"{prefix}{name}", value


def _wandb(config: TrainConfig, n_params: int, resumed: bool, closing: ExitStack) -> Logger:
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb_log needs wandb: pip install 'eqx-gpt[wandb]'") from None
    directory = Path(config.out_dir)
    path = directory / WANDB_ID
    run_id = path.read_text("utf-8").strip() if resumed and path.exists() else secrets.token_hex(4)
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name or directory.name,
            config={**dataclasses.asdict(config), "n_params": n_params},
            allow_val_change=True,
            dir=directory,
            id=run_id,
            resume="allow",
        )
    except wandb.Error as error:
        raise ValueError(
            f"wandb_log: {error}; set WANDB_MODE=offline to log to {directory}/wandb alone"
        ) from None
    path.write_text(f"{run_id}\n", encoding="utf-8")
    closing.callback(run.finish)
    return lambda record: run.log(numbers(record), step=record["iter"])


def _tensorboard(config: TrainConfig, closing: ExitStack) -> Logger:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "tensorboard_log needs tensorboardX: pip install 'eqx-gpt[tensorboard]'"
        ) from None
    writer = SummaryWriter(str(Path(config.out_dir) / "tensorboard"))
    closing.callback(writer.close)

    def write(record: dict[str, Any]) -> None:
        for name, value in numbers(record).items():
            writer.add_scalar(name, value, record["iter"])
        writer.flush()

    return write
