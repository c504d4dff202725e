"""Time, as a run counts it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """The rate of training since it was last asked, evaluations and checkpoints apart."""

    def __init__(self, steps_done: int, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._since_step, self._since_time = steps_done, time.monotonic()

    def tokens_per_s(self, steps_done: int) -> float:
        now = time.monotonic()
        tokens = (steps_done - self._since_step) * self._tokens_per_step
        rate = tokens / (now - self._since_time)
        self._since_step, self._since_time = steps_done, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._since_time += time.monotonic() - start
