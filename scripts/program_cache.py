"""Compiled programs, kept in the user's cache directory between runs of the commands."""

import os
import platform
import time
import zlib
from pathlib import Path

SWITCH = "EQX_GPT_COMPILATION_CACHE"
OFF = ("off", "0", "false", "no")
_MAX_BYTES = 2 * 2**30
_WRITING_S = 60.0


def keep_programs() -> None:
    """Before jax is imported: point it at a cache of this user and this kind of CPU.

    Nothing happens with `EQX_GPT_COMPILATION_CACHE=off`, where `JAX_COMPILATION_CACHE_DIR` is set
    already, or where nothing can be written.
    """
    if os.environ.get(SWITCH, "").lower() in OFF or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # XLA's programs for a CPU use all that it can do: another machine may not run them.
    kind = f"{zlib.crc32(_cpu_features()):08x}"
    try:
        directory = Path(root).expanduser() / "eqx_gpt" / f"programs-{kind}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for entry in directory.glob("*-cache"):
            # jax writes a second file once the entry is whole, and fails without it later.
            whole = entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists()
            if not whole and time.time() - entry.stat().st_mtime > _WRITING_S:
                entry.unlink(missing_ok=True)
        writable = os.access(directory, os.W_OK)
    except (OSError, RuntimeError):  # a disk that cannot be written, no home
        return
    if writable:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MAX_BYTES))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _cpu_features() -> bytes:
    try:
        with open("/proc/cpuinfo", "rb") as lines:
            return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return platform.processor().encode()
