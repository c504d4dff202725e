"""The terminal twin of report.html."""

from collections.abc import Sequence

import rich.box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from train.history import History
from train.report import key_figures, state
from train.svg import Number, short
from train.watch import verdict_of

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVES = (
    ("val loss", "evaluations", "val_loss"),
    ("train loss", "steps", "train_loss"),
    ("learning rate", "steps", "lr"),
    ("gradient norm", "steps", "grad_norm"),
    ("tokens/s", "steps", "tokens_per_s"),
)


def report_terminal(histories: Sequence[History], width: int = 60) -> RenderableType:
    """What the page shows, in text; curves `width` characters wide."""
    parts: list[RenderableType] = []
    for history in histories:
        parts.append(Text(f"{history.name}: {state(history)}", style="bold"))
        figures = Table.grid(padding=(0, 2))
        for name, value in key_figures(history).items():
            figures.add_row(Text(name, style="dim"), Text(value))
        parts += [figures, Text("\n".join(verdict_of(history).lines()))]
        parts += [_curves(history, width), _phases(history)]
        if history.samples:
            sample = history.samples[-1]
            parts.append(Text(f"a sample after step {sample['iter']:,}:", style="dim"))
            parts.append(Text(f"{sample.get('text', '')}\n"))
    return Group(*parts)


def sparkline(values: Sequence[Number], width: int) -> str:
    """A curve of so many characters at most, from its least value to its greatest."""
    size = -(-len(values) // width) or 1
    means = [
        sum(part) / len(part)
        for part in (values[first : first + size] for first in range(0, len(values), size))
    ]
    low, span = min(means), max(means) - min(means)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((x - low) / span * top) if span else 0] for x in means)


def _curves(history: History, width: int) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD)
    for head in ("curve", "", "first", "least", "most", "last"):
        table.add_column(head, justify="left" if head in ("curve", "") else "right")
    for title, kind, name in _CURVES:
        records = history.steps if kind == "steps" else history.evaluations
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            ends = (values[0], min(values), max(values), values[-1])
            table.add_row(title, sparkline(values, width), *map(short, ends))
    return table


def _phases(history: History) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD)
    for head in ("phase", "seconds", "share", ""):
        table.add_column(head, justify="right" if head in ("seconds", "share") else "left")
    total = sum(history.seconds.values()) or 1.0
    for phase, seconds in history.seconds.items():
        share = seconds / total
        table.add_row(phase, f"{seconds:,.1f}", f"{share:.1%}", "█" * round(30 * share))
    return table
