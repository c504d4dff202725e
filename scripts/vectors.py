"""The width of vectors in the loops that XLA makes for a CPU."""

import os
from pathlib import Path

_WIDTH = "--xla_cpu_prefer_vector_width"


def use_whole_vectors() -> None:
    """Before jax is imported: on a CPU with registers of 512 bits ask for all of them.

    XLA by itself takes half. What `XLA_FLAGS` says of it already stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _WIDTH not in flags and _has_512_bits():
        os.environ["XLA_FLAGS"] = f"{flags} {_WIDTH}=512".strip()


def _has_512_bits() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        return False
