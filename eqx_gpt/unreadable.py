"""Why a checkpoint cannot be read: one short reason, for the tracebacks that Orbax leaves about."""

import gc
import logging
import re
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


# Not of the file: another try may read it.
_ELSEWHERE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class Unreadable(Exception):
    """What was read is damaged; the message is a reason of one short line."""


def read(action: Callable[[], T]) -> T:
    """`action()`, which reads files through Orbax.

    Unreadable if they are damaged; OSError if they may not be read, or there is no memory for them.

    Orbax reads in many tasks at once and ends at the first failure. What the interpreter would
    print of the tasks left alone, later and with all their tracebacks, says no more.
    """
    said = logging.getLogger("asyncio")
    hooks, disabled = (sys.unraisablehook, sys.excepthook), said.disabled
    sys.unraisablehook = sys.excepthook = lambda *_: None
    said.disabled = True
    try:
        found = _tried(action)
        if isinstance(found, Unreadable | OSError):
            gc.collect()  # the tasks, while nobody hears them
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


def _first(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _first(error.__cause__)


def _short(error: BaseException) -> str:
    """In one short line."""
    line = str(error).strip().partition("\n")[0]
    # Of TensorStore's: its status, the place of its files, where in the compressed stream.
    line = re.sub(
        r'^[A-Z_]+: | in OCDBT database at local file "[^"]*"|; at (un\w+ )?byte.*', "", line
    )
    if not isinstance(error, ValueError | OSError):
        line = f"{type(error).__name__}: {line}"
    return line[:200] or type(error).__name__
