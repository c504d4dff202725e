"""Where the time of a run goes: every moment belongs to one phase."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

import jax

Phase = Literal["start", "data", "step", "log", "evaluation", "checkpoint", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In turn: until the first step, compiling it included; blocked until the next batch is there;
computing steps; writing metrics and telling the loggers; evaluations, compiling theirs included;
blocked by a checkpoint (writing goes on behind the steps); samples, pictures, the end."""

TRAINING: tuple[Phase, ...] = ("data", "step", "log")
"""The phases that a rate of training is of."""

T = TypeVar("T")


class Clock:
    """Seconds by phase, of all the processes of a run, and the rate of training.

    It starts in the phase `start`; `phase` is a context manager, within which another one stops
    the outer one's time. A profile shows the phases by their names.
    """

    def __init__(
        self,
        before: Mapping[str, float] | None = None,
        elapsed_s: float = 0.0,
        since: float | None = None,
    ) -> None:
        """
        **Arguments:**

        - `before`: the `seconds` of earlier processes; `elapsed_s` is their sum or, where they
          knew of no phases, all that is known.
        - `since`: what `time.monotonic()` was when this process's time began; None is now.
        """
        self._seconds = dict.fromkeys(PHASES, 0.0)
        for phase in PHASES:
            self._seconds[phase] += (before or {}).get(phase, 0.0)
        self._seconds["other"] += max(0.0, elapsed_s - sum(self._seconds.values()))
        self._phase: Phase = "start"
        self._since = time.monotonic() if since is None else since
        self._rate_since = self.training_s()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        outer = self._switch(name)
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._switch(outer)

    def timed(self, items: Iterator[T], name: Phase) -> Iterator[T]:
        """The same items; waiting for one is time of this phase."""
        while True:
            with self.phase(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[Phase, float]:
        """By phase, until now. They add up to the time of the run."""
        self._switch(self._phase)
        return dict(self._seconds)

    @property
    def elapsed_s(self) -> float:
        return sum(self.seconds().values())

    def training_s(self) -> float:
        """Of it, what steps took, and what they waited for."""
        seconds = self.seconds()
        return sum(seconds[phase] for phase in TRAINING)

    def rate(self, tokens: int) -> float:
        """Tokens a second of training since it was last asked, when `tokens` are what came since.
        Starting, evaluations, checkpoints and the like are apart."""
        now = self.training_s()
        rate = tokens / max(now - self._rate_since, 1e-9)
        self._rate_since = now
        return rate

    def _switch(self, to: Phase) -> Phase:
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        before, self._phase, self._since = self._phase, to, now
        return before
