"""A run that ends when the loss over the whole validation split is low enough."""

import os
import time
from pathlib import Path

from jax.typing import DTypeLike

from eqx_gpt.gpt import GPT
from train.evaluate import Progress, dataset_loss
from train.manifest import Manifest

_TOKENS = 2048  # of a batch of the evaluation: few enough for a CPU's caches
_IMPORTED_AT = time.monotonic()


def whole_val_loss(
    model: GPT, data: Manifest, block_size: int, dtype: DTypeLike, progress: Progress
) -> float:
    """Mean loss, in nats a token, over every token of the validation split, in consecutive blocks;
    of conversations, over every token that is learnt. As `scripts/eval.py` finds it in the same
    `dtype`."""
    return dataset_loss(
        model, data, "val", block_size=block_size, stride=None, dtype=dtype,
        micro_batch_size=max(1, _TOKENS // block_size), progress=progress,
    )[0]  # fmt: skip


def seconds_since_start() -> float:
    """Since this process began, imports and what came before them included.

    Where the system does not tell (it is no Linux), since this module was imported.
    """
    try:
        # The 22nd field; those after the name of the program, which may hold spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError):
        return time.monotonic() - _IMPORTED_AT
    return up - int(fields[19]) / os.sysconf("SC_CLK_TCK")
