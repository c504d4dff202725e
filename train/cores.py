"""The cores of a CPU: as one device, or as several.

Computing together on each operation, cores wait for each other some thousand times a step. Where
an operation takes less than a tenth of a millisecond that is a third of the time; so a small
model's sequences are split over several devices, which meet once a step.
"""

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_WIDEST = 512
_MOST = 4  # each device holds the whole model, and more than two were never compared
_FEWEST_TOKENS = 256  # below them a core has too little to do between two operations
_TOGETHER, _ALONE = 1024, 512  # tokens that a core's caches hold


def usable_cores() -> int:
    """Those that this process may run on, and its container pays for."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
    except (OSError, ValueError):  # no Linux, or an old one
        return n
    return n if quota == "max" else max(1, min(n, int(quota) // int(period)))


def wide(n_embd: int) -> bool:
    """Whether each operation of such a model keeps all cores busy."""
    return n_embd > _WIDEST


def core_devices(n_embd: int, rows: int, block_size: int, optimizer: str) -> int:
    """Over how many devices of this CPU to split `rows` sequences at once; 1 where that gains
    nothing."""
    # Each device does the whole update, which Muon's products make long.
    if wide(n_embd) or optimizer == "muon":
        return 1
    most = max(1, min(_MOST, usable_cores(), rows * block_size // _FEWEST_TOKENS))
    return max(d for d in range(1, most + 1) if rows % d == 0)


def cached_tokens(n_embd: int, *, alone: bool) -> float:
    """The most tokens of a micro-batch, for all cores together or for one device of several: of a
    small model more would leave the caches. A wide one's layers do in any case."""
    if wide(n_embd):
        return math.inf
    return float(_ALONE if alone else _TOGETHER * usable_cores())
