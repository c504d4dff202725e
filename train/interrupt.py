"""Ctrl-C, SIGTERM and SIGUSR1 as a request that the loop answers between steps or micro-batches.

Schedulers send SIGTERM some seconds before SIGKILL, and SLURM what `--signal` names.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
_GRACE_S = 2.0  # to unwind in, after the second signal


class Interrupted(Exception):
    """The run was asked to end; the signal's name is its argument."""


class Interruption:
    """While entered, the first signal is kept for `check`; a second one ends at once.

    Python looks at signals only between two of its own instructions, which a step on a device may
    keep it from for long. A thread hears them at once: it ends the process, with the signal's exit
    code, `deadline_s` seconds after the first one (0: never; Ctrl-C has no deadline), or when a
    second one is not answered. What was not on disk by then is lost, and nothing else.
    """

    def __init__(
        self,
        on_request: Callable[[], None],
        deadline_s: float = 0.0,
        agree: Callable[[int], int] = lambda number: number,
    ) -> None:
        """`agree` makes of this process's signal, or 0, that of all the run's processes, which
        call `check` equally often."""
        self._on_request, self._deadline_s, self._agree = on_request, deadline_s, agree
        self._requested: str | None = None
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}
            ours, theirs = self._sockets = socket.socketpair()
            theirs.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(ours,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._sockets is not None:
            signal.set_wakeup_fd(self._previous_fd)
            self._sockets[1].close()  # the thread hears that, and ends

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

    def _watch(self, ours: socket.socket) -> None:
        end, why, first = float("inf"), "", 0
        with ours:
            while True:
                left = min(end - time.monotonic(), 3600.0)
                if left <= 0:
                    _end_now(first, why)
                if not select.select([ours], [], [], left)[0]:
                    continue
                heard = ours.recv(64)
                if not heard:
                    return
                for number in heard:
                    if number not in self._previous:
                        continue
                    if first:
                        end, why = time.monotonic() + _GRACE_S, "a second signal came"
                    elif self._deadline_s and number != signal.SIGINT:
                        end = time.monotonic() + self._deadline_s
                        why = f"preemption_s={self._deadline_s:g} is over"
                    first = first or number


def _end_now(number: int, why: str) -> None:
    cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
    message = f"{cursor}ended at once, for {why}: the last checkpoint on disk counts\n"
    os.write(2, message.encode())
    os._exit(128 + number)
