"""The process of a command that computes, set up before jax is imported.

XLA allocates its large buffers anew at each use. malloc gives them back to the kernel, which zeroes
them again, 4 KiB at a time, unless tunables read at process start ask for huge pages and for memory
to be kept: under Linux with glibc, computing on a CPU, a command starts itself once more with them,
unless `EQX_GPT_ALLOCATOR=off`.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

from scripts.processor import computes_on_cpu
from scripts.program_cache import OFF, keep_programs
from scripts.xla_loops import use_whole_vectors

SWITCH = "EQX_GPT_ALLOCATOR"
_M_ARENA_MAX = -8  # of glibc's malloc.h
_HUGE = "glibc.malloc.hugetlb=1"  # transparent ones, by madvise
_KEPT = "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184"
TUNABLES = f"{_HUGE}:{_KEPT}:glibc.malloc.top_pad=268435456"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def prepare_process(name: str) -> None:
    """Call it first in a command, with its `__name__`; nothing happens in an imported module.

    May replace the process by itself with another environment: same arguments, id and files.
    """
    if name != "__main__":
        return
    tunables = _wanted_tunables()
    if tunables != os.environ.get("GLIBC_TUNABLES") and sys.argv[0] in sys.orig_argv:  # not runpy
        environment = {**os.environ, "GLIBC_TUNABLES": tunables, SWITCH: "set"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    if computes_on_cpu():
        use_whole_vectors()
    keep_programs()


def keep_what_threads_free() -> None:
    """Before a prepared process has other threads: let them allocate from malloc's first arena,
    the only one that keeps gigabytes. Many small allocations would wait for each other there."""
    tunables, off = os.environ.get("GLIBC_TUNABLES", ""), os.environ.get(SWITCH, "").lower() in OFF
    if _HUGE in tunables and "arena_max" not in tunables and not off and _has_huge_pages():
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def describe_process() -> str:
    """What is set, for the header of a run."""
    huge = _HUGE in os.environ.get("GLIBC_TUNABLES", "")
    memory = f"huge pages for malloc ({SWITCH}=off: none)" if huge else "malloc as it was"
    place = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    kept = f"compiled programs in {place}" if place else "compiled programs not kept"
    return f"{memory}, {kept}"


def _wanted_tunables() -> str | None:
    """GLIBC_TUNABLES as it should be: what the user set, and ours where it belongs."""
    current = os.environ.get("GLIBC_TUNABLES")
    if os.environ.get(SWITCH, "").lower() in (*OFF, "set") or not sys.executable:
        return current
    if not (_has_huge_pages() and computes_on_cpu()):
        return current
    theirs = current.split(":") if current else []
    named = {tunable.split("=")[0] for tunable in theirs}
    return ":".join([*theirs, *(t for t in TUNABLES.split(":") if t.split("=")[0] not in named)])


def _has_huge_pages() -> bool:
    """Is this a Linux that gives huge pages to who asks, with a glibc (2.35) that can ask?"""
    library, version = platform.libc_ver()
    numbers = [int(part) for part in version.split(".") if part.isdigit()]
    if library != "glibc" or numbers < [2, 35]:
        return False
    return os.access(_HUGE_PAGES, os.R_OK) and "[never]" not in _HUGE_PAGES.read_text()
