"""Why a checkpoint cannot be read: one short reason, for the tracebacks that Orbax leaves about."""

import asyncio
import gc
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


_PATIENCE_S = 10  # with reads that a failed one leaves in flight
_ONE_AT_A_TIME = threading.Lock()  # for what is set aside meanwhile is the process's

# Not of the file: another try may read it.
_ELSEWHERE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
# In TensorStore's messages, beside what is wrong with which array.
_BESIDES = (
    r"^[A-Z_]+: ",
    r'Error opening "\w+" driver: ',
    r' in OCDBT database at local file "[^"]*"',
    r': Error reading Byte range \S+ \S+ of local file "[^"]*"',
    r"; at (un\w+ )?byte.*",
    r" \[tensorstore_spec=.*",
)


class Unreadable(Exception):
    """What was read is damaged; the message is a reason of one short line."""


def read(action: Callable[[], T]) -> T:
    """`action()`, which reads files through Orbax.

    Unreadable if they are damaged; OSError if they may not be read, or there is no memory for them.

    Orbax reads in many tasks at once and ends at the first failure. What the interpreter would
    print of the tasks left alone, with all their tracebacks, says no more: nobody hears it, and
    this waits for what TensorStore still reads for them.
    """
    said = logging.getLogger("asyncio")
    with _ONE_AT_A_TIME:
        hooks, disabled = (sys.unraisablehook, sys.excepthook), said.disabled
        sys.unraisablehook = sys.excepthook = lambda *_: None
        said.disabled = True
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
                found = _tried(action)
                if isinstance(found, Unreadable | OSError):
                    until = time.monotonic() + _PATIENCE_S
                    while _still_reading() and time.monotonic() < until:
                        time.sleep(0.01)
                    raise found
            return found
        finally:
            (sys.unraisablehook, sys.excepthook), said.disabled = hooks, disabled


def _tried(action: Callable[[], T]) -> T | Unreadable | OSError:
    """Its own function, so that no frame holds the error, and with it the tasks, any longer."""
    try:
        return action()
    except Exception as error:  # of json, orbax, tensorstore
        first = _first(error)
        elsewhere = isinstance(first, MemoryError | PermissionError)
        elsewhere |= str(first).startswith(_ELSEWHERE)
        return OSError(_short(first)) if elsewhere else Unreadable(_short(first))


def _still_reading() -> bool:
    """Whether a task is left of an event loop that is closed, which TensorStore may read for."""
    gc.collect()
    # By `type`: an object that stands for another may do anything when asked for its class.
    futures = [x for x in gc.get_objects() if issubclass(type(x), asyncio.Future)]
    # `_loop`, as `get_loop` fails for one that was never initialized.
    orphans = [x for x in futures if x._loop and x._loop.is_closed()]
    return any(not orphan.done() or orphan._log_traceback for orphan in orphans)


def _first(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _first(error.__cause__)


def _short(error: BaseException) -> str:
    """In one short line."""
    line = str(error).strip().partition("\n")[0]
    line = re.sub("|".join(_BESIDES), "", line)
    if not isinstance(error, ValueError | OSError):
        line = f"{type(error).__name__}: {line}"
    return line[:200] or type(error).__name__
