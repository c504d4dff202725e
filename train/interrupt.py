"""Ctrl-C and SIGTERM as a request that the loop answers between two micro-batches."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """The run was asked to end; the signal's name is its argument."""


class Interruption:
    """While entered, the first Ctrl-C or SIGTERM is kept for `check`; a second one ends at once."""

    def __init__(self, on_request: Callable[[], None]) -> None:
        self._on_request = on_request
        self._requested: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Interrupted, if a signal has come."""
        if self._requested is not None:
            raise Interrupted(self._requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested is not None:
            raise KeyboardInterrupt
        self._requested = signal.Signals(number).name
        self._on_request()
