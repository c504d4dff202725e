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

    def __init__(
        self, on_request: Callable[[], None], agree: Callable[[int], int] = lambda number: number
    ) -> None:
        """`agree` makes of this process's signal, or 0, that of all the run's processes, which
        call `check` equally often."""
        self._on_request, self._agree = on_request, agree
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
        """Interrupted, if a signal has come, to any of the run's processes."""
        requested = 0 if self._requested is None else signal.Signals[self._requested].value
        if agreed := self._agree(requested):
            raise Interrupted(signal.Signals(agreed).name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested is not None:
            raise KeyboardInterrupt
        self._requested = signal.Signals(number).name
        self._on_request()
