"""One process on a run directory: a second one is told who the first is.

A POSIX record lock on `run.lock`, which the kernel lifts when the process ends, however it ends; it
holds over NFS where the server locks at all (most do). Windows has none: nothing is checked there.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train.run import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def locked(directory: str | Path) -> Iterator[None]:
    """RunError if another process holds the directory, or if it cannot be written.

    The file stays: removing it would let two processes hold one lock each.
    """
    path = Path(directory) / "run.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise RunError(f"cannot write to {str(directory)!r}: {error.strerror}") from None
    with file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise RunError(
                    f"another process trains in {str(directory)!r}: {_holder(path)}; wait for it, "
                    "stop it, or give another --out_dir"
                ) from None
            except OSError:  # a file system without locks
                pass
        with suppress(OSError):  # on a full disk nobody is told who the first is
            file.truncate(0)
            holder = {"host": socket.gethostname(), "pid": os.getpid()}
            file.write((json.dumps(holder) + "\n").encode())
        yield


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"
