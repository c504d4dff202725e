"""Accounting (FLOPs, MFU) and where the numbers go: metrics.jsonl and the optional loggers."""

import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from train.config import TrainConfig
from train.files import write_atomically

Logger = Callable[[dict[str, Any]], None]

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; keys are parts of JAX's
# `device_kind`, the more special ones first.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
}


def flops_per_token(n_params: int, n_layer: int, n_embd: int, seq: int, n_frozen: int = 0) -> float:
    """Floating-point operations to train on one token: 6 N + 12 L d T, less 2 for each of the
    `n_frozen` parameters, which need no gradient.

    The convention of PaLM's appendix B (arXiv:2204.02311): forward and backward, the token
    embedding counted once, no discount for the causal half of attention.
    """
    return 6.0 * n_params - 2.0 * n_frozen + 12.0 * n_layer * n_embd * seq


def peak_flops(dtype: DTypeLike) -> float | None:
    """The device's peak in FLOP/s: published for accelerators, measured on a CPU.

    None for an accelerator that the table does not know.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_matmul_flops(dtype)
    for kind, flops in _PEAK_FLOPS.items():
        if kind in device.device_kind:
            return flops
    return None


def _measured_matmul_flops(dtype: DTypeLike) -> float:
    """The best of a few products of 1024 x 1024 matrices."""
    n = 1024
    a = jax.device_put(np.ones((n, n), dtype))
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, flushed as it is written."""

    def __init__(self, path: Path, steps_done: int, evaluated_at: int | None) -> None:
        """Open to append after `steps_done` steps, the last evaluation after `evaluated_at`.

        What an interrupted run logged beyond its last checkpoint is dropped, for those steps
        will be done again: the file reads as if there had been no interruption.
        """
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if _belongs(line, steps_done, -1 if evaluated_at is None else evaluated_at):
                    kept.append(line)
        partial = path.with_suffix(".jsonl.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self._path, self._unwritten = path, b""
        self._file = path.open("a+b", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """OSError if it cannot be written; it is then, before the next one."""
        # JSON has no NaN.
        plain = {k: None if _is_nan(value) else value for k, value in record.items()}
        self._unwritten += (json.dumps(plain, allow_nan=False) + "\n").encode()
        size = self._file.seek(0, os.SEEK_END)
        n_written = 0
        try:
            n_written = self._file.write(self._unwritten)
        finally:
            if n_written < len(self._unwritten):
                self._file.truncate(size)  # half a line would spoil the next
        if n_written < len(self._unwritten):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unwritten = b""

    def rescue(self) -> None:
        """Write the file again, should its directory have been removed under the open file."""
        if not self._path.exists():
            self._file.seek(0)
            content = self._file.read()
            write_atomically(self._path, content)
            self._file.close()
            self._file = self._path.open("a+b", buffering=0)

    def close(self) -> None:
        self._file.close()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _belongs(line: str, steps_done: int, evaluated_at: int) -> bool:
    """Was this line logged by a step before `steps_done`, or an evaluation to `evaluated_at`?"""
    try:
        record = json.loads(line)
    except ValueError:  # cut off by a kill
        return False
    is_evaluation = "val_loss" in record
    known = record["iter"] <= evaluated_at if is_evaluation else record["iter"] < steps_done
    return line.endswith("\n") and known


def extra_loggers(config: TrainConfig, n_params: int) -> list[Logger]:
    """Weights & Biases and TensorBoard, if asked for. ValueError if not installed."""
    loggers: list[Logger] = []
    if config.wandb_log:
        try:
            import wandb
        except ImportError:
            raise ValueError("wandb_log needs wandb: pip install 'eqx-gpt[wandb]'") from None
        name = config.wandb_run_name or Path(config.out_dir).name
        recorded = {**dataclasses.asdict(config), "n_params": n_params}
        run = wandb.init(project=config.wandb_project, name=name, config=recorded)
        loggers.append(lambda record: run.log(record, step=record["iter"]))
    if config.tensorboard_log:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError(
                "tensorboard_log needs tensorboardX: pip install 'eqx-gpt[tensorboard]'"
            ) from None
        writer = SummaryWriter(str(Path(config.out_dir) / "tensorboard"))

        def write(record: dict[str, Any]) -> None:
            for name, value in record.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, record["iter"])
            writer.flush()

        loggers.append(write)
    return loggers
