"""Long work, seen: a bar with an ETA on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 10.0


@contextmanager
def reporting(description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives `update(done)`, to be called as often as one likes; reports to stderr.

    `total`, in the same unit as `done`, may be None (unknown): then there is no ETA.
    """
    if sys.stderr.isatty():
        with _bar(description, total, unit) as update:
            yield update
    else:
        yield _lines(description, total, unit)


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    import rich.console
    import rich.progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[count]}"),
        bars.TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = rich.console.Console(stderr=True)
    with bars.Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, count="")

        def update(done: int) -> None:
            progress.update(task, completed=done, count=_count(done, total, unit))

        yield update


def _lines(description: str, total: int | None, unit: str) -> Callable[[int], None]:
    start: tuple[float, int] | None = None  # work taken up where it stopped does not count as fast
    last = 0.0

    def update(done: int) -> None:
        nonlocal start, last
        now = time.monotonic()
        if start is None:
            start, last = (now, done), now
        if now - last < LINE_EVERY_S:
            return
        last = now
        rate = (done - start[1]) / (now - start[0])
        line = f"{description}: {_count(done, total, unit)}, {rate:,.0f} {unit}/s"
        if total and rate > 0:
            line += f", ETA {duration((total - done) / rate)}"
        print(line, file=sys.stderr, flush=True)

    return update


def _count(done: int, total: int | None, unit: str) -> str:
    return f"{done:,} of {total:,} {unit}" if total else f"{done:,} {unit}"


def duration(seconds: float) -> str:
    """Such as 0:01:30; in days where hours would not be read."""
    if seconds >= 100 * 3600:
        return f"{seconds / 86400:,.0f} days"
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
