"""What a person sees of a run, on stderr: a header, a live line, lines that stay.

On a terminal the newest step is one line that renews itself. Elsewhere every logged step is a
plain line, `iter 10/2000 loss 2.1034 ...`, without control characters.
"""

import sys
import time
from types import TracebackType
from typing import Any

import rich.console
import rich.progress

from train.progress import LINE_EVERY_S, duration


class Display:
    """A context manager; the live line lasts as long as it."""

    def __init__(self, max_iters: int, *, silent: bool = False) -> None:
        """`silent` says nothing: another process of the run does."""
        self._max_iters = max_iters
        self._console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: rich.progress.Progress | None = None
        self._last_line = float("-inf")
        self._silent = silent
        if self._console.is_terminal and not silent:
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(bar_width=20),
                rich.progress.TextColumn("{task.description}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task("starting", total=max_iters)

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def header(self, rows: dict[str, str]) -> None:
        width = max(map(len, rows))
        for name, value in rows.items():
            self.line(f"{name:<{width}}  {value}")

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._silent:
            return
        if self._bar is not None:
            self._console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, record: dict[str, Any], eta_s: float) -> None:
        """A logged step."""
        text = (
            f"iter {record['iter']}/{self._max_iters} loss {record['train_loss']:.4f} "
            f"lr {record['lr']:.2e} {_rate(record['tokens_per_s'], record['mfu'])} "
            f"eta {duration(eta_s)}"
        )
        self._show(record["iter"] + 1, text, stays=True)

    def micro(
        self,
        step: int,
        done: int,
        n_micro: int,
        loss: float,
        tokens_per_s: float,
        mfu: float | None,
        eta_s: float,
    ) -> None:
        """A micro-batch within a long step; the loss is the step's mean so far."""
        text = (
            f"iter {step}/{self._max_iters} micro {done}/{n_micro} loss {loss:.4f} "
            f"{_rate(tokens_per_s, mfu)} eta {duration(eta_s)}"
        )
        self._show(step, text, stays=self._last_line == float("-inf"))

    def working(self, step: int, text: str) -> None:
        """Something else that takes its time, such as an evaluation."""
        self._show(step, text, stays=False)

    def _show(self, done: int, text: str, *, stays: bool) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif stays or time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.line(text)


def _rate(tokens_per_s: float, mfu: float | None) -> str:
    rate = f"{tokens_per_s:,.0f} tok/s"
    return rate if mfu is None else f"{rate} mfu {mfu:.1%}"
