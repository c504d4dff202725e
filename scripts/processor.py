"""What a command will compute on, before jax is imported."""

import glob
import importlib.util
import os
from pathlib import Path

# What NVIDIA's, AMD's and Google's drivers make.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def computes_on_cpu() -> bool:
    """Will jax, which is not imported yet, compute on the CPU?"""
    asked = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    if asked:
        return asked.split(",")[0].strip().lower() == "cpu"
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return not (plugins and any(glob.glob(pattern) for pattern in _ACCELERATORS))


def has_512_bits() -> bool:
    """Has this CPU vector registers of so many?"""
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        return False
