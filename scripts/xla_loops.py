"""How XLA makes its loops for a CPU: with whole vector registers, and several results a loop."""

import os
from pathlib import Path

_WIDTH = "--xla_cpu_prefer_vector_width"
_BACKEND_OPTIONS = "--xla_backend_extra_options"


def use_whole_vectors() -> None:
    """Before jax is imported: on a CPU with registers of 512 bits ask for all of them.

    XLA by itself takes half. What `XLA_FLAGS` says of it already stays.
    """
    if _has_512_bits():
        _add(_WIDTH, "512")


def fuse_results() -> None:
    """Before jax is imported: let a loop have several results, so that an optimizer's averages and
    weights are made in one pass over memory instead of three."""
    _add(_BACKEND_OPTIONS, "xla_cpu_use_multi_output_fusion=true")


def _add(flag: str, value: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={value}".strip()


def _has_512_bits() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        return False
