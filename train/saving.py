"""What a run does when something beside training fails: it says so, and goes on."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from train.checkpoint import Checkpoints
from train.interrupt import Interrupted
from train.step import TrainState


class Unharmed:
    """`with unharmed("loss.png"): ...`: an error in there is said, and passed over."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._said = say, set[str]()

    @contextmanager
    def __call__(self, what: str, *, once: bool = True) -> Iterator[None]:
        """With `once` it is said the first time only."""
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:
            if not once and jax.process_count() > 1:
                raise  # the other processes take part in it, and would wait for this one
            if not (once and what in self._said):
                more = "; this is said once" if once else ""
                self._say(f"{what.upper()} FAILED, the run goes on{more}: {reason(error)}")
            self._said.add(what)


class Saver:
    """Writes checkpoints; one that fails is said, and tried again by the next save.

    In a run of several processes it raises OSError instead, for the others wait for the part that
    was not written: the run ends, and goes on from the last whole checkpoint.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        directory: Path,
        mend: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        """`mend` writes what else a run directory holds, should the directory have vanished."""
        self._checkpoints, self._directory, self._mend, self._say = (
            checkpoints, directory, mend, say,
        )  # fmt: skip
        self.saved_at = time.monotonic()
        self._saved: tuple[int, int | None] | None = None

    def save(
        self, state: TrainState, step: int, progress: Mapping[str, Any], *, wait: bool = False
    ) -> bool:
        """Is what there is after `step` steps on disk, or with `wait` False, on its way?

        Nothing is written if a checkpoint of this step knows of this step's evaluation already.
        """
        now = (step, progress["evaluated_at"])
        if self._saved == now and not wait:
            return True
        self._try(self._checkpoints.wait)  # what failed before is said, and no reason not to try
        if self._saved == now:
            return True
        self.saved_at = time.monotonic()  # one that fails is not tried again by the next step
        if not (self._try(self._mend_directory) and self._try(
            lambda: self._checkpoints.save(state, step, progress)
        )):  # fmt: skip
            return False
        if wait and not self._try(self._checkpoints.wait):
            return False
        self._saved = now
        return True

    def restored(self, step: int, evaluated_at: int | None) -> None:
        """What the run goes on from needs no saving."""
        self._saved = (step, evaluated_at)

    def poll(self) -> None:
        """Has a save that was on its way failed?"""
        if (error := self._checkpoints.failure()) is not None:
            self._failed(error)

    def _try(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: Exception) -> None:
        self._saved = None
        last = self._checkpoints.latest_step()
        there = "none is on disk" if last is None else f"the last on disk is step {last}"
        said = f"CHECKPOINT IN {self._directory} NOT WRITTEN, {there}: {reason(error)}"
        if jax.process_count() > 1:
            raise OSError(said) from error
        self._say(said)

    def _mend_directory(self) -> None:
        if not (self._directory / "run.json").exists():
            self._say(f"{self._directory} IS GONE, and is made anew")
            self._mend()


def reason(error: Exception) -> str:
    """The first line of an error, short."""
    first = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
