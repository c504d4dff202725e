"""report.html: a run, or several beside each other, on one page that needs nothing else.

`report_html` makes it of histories; every text that comes from a run is escaped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from train.diagnosis import case_of
from train.files import write_atomically
from train.history import History, read_history
from train.progress import duration
from train.reference import band
from train.summary import MEANING
from train.svg import Band, Line, Points, chart, short
from train.watch import verdict_of

# Phases by the colours of the bar; what comes to nothing beside training is grey.
_COLOURS = {"step": "c0", "evaluation": "c2", "checkpoint": "c1", "data": "c5", "start": "c4",
            "log": "c3", "other": "soft"}  # fmt: skip


def write_report(directories: Sequence[Path], target: Path) -> list[History]:
    """Write the page of these runs; their histories. RunError for a directory without a run."""
    histories = [read_history(directory) for directory in directories]
    write_atomically(target, report_html(histories).encode())
    return histories


def try_report(run: Path) -> list[str]:
    """Write run/report.html; what to tell if that fails, for a run is worth more than its report.
    Nothing happens before the first line of metrics."""
    try:
        if (run / "metrics.jsonl").stat().st_size:
            write_report([run], run / "report.html")
    except Exception as error:
        return [f"no report: {type(error).__name__}: {error}"]
    return []


def report_html(histories: Sequence[History]) -> str:
    """The page; with the band of the reference, where the runs have one in common."""
    names = ", ".join(history.name for history in histories)
    one = len(histories) == 1
    style = (resources.files("train") / "report.css").read_text(encoding="utf-8")
    body = [
        f"<h1>{escape(names)}</h1>",
        f'<p class="sub">{escape("; ".join(map(state, histories)))}</p>',
        _cards(histories[0]) if one else _comparison(histories),
        f"<h2>Is it normal?</h2>{''.join(_verdict(history, one) for history in histories)}",
        f'<h2>Curves</h2><div class="charts">{_charts(histories, _band(histories))}</div>',
        f"<h2>Time</h2>{''.join(_phases(history, one) for history in histories)}",
        *(_samples(history, one) for history in histories if history.samples),
        f"<h2>Configuration</h2>{_settings(histories)}",
        "<h2>Environment</h2>",
        *(_environment(history, one) for history in histories),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def state(history: History) -> str:
    """How far the run is, in words."""
    asked = history.run["config"].get("max_iters", 0)
    data, elapsed = history.run["data"].get("name"), duration(history.last.get("elapsed_s", 0.0))
    done = f"all {asked:,} steps" if history.steps_done >= asked else (
        f"{history.steps_done:,} of {asked:,} steps"
    )  # fmt: skip
    return f"{done} on {data} in {elapsed}"


def key_figures(history: History) -> dict[str, str]:
    """The numbers that a run is known by, with their units."""
    found = {"steps": f"{history.steps_done:,}"}
    if history.steps:
        found["train loss"] = _loss(history.steps[-1]["train_loss"])
    losses = [e["val_loss"] for e in history.evaluations if e["val_loss"] is not None]
    if losses:
        found |= {"val loss": _loss(losses[-1]), "best val loss": _loss(min(losses))}
    if "tokens" in history.last:
        found |= {"tokens": short(history.last["tokens"]), "FLOPs": f"{history.last['flops']:.3g}"}
    if (rate := history.mean_rate()) is not None:
        found["tokens/s"] = f"{rate[0]:,.0f}"
        if rate[1] is not None:
            found["MFU"] = f"{rate[1]:.1%}"
    found["time"] = duration(history.last.get("elapsed_s", 0.0))
    return found


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _cards(history: History) -> str:
    cards = (
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in key_figures(history).items()
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _verdict(history: History, one: bool) -> str:
    name = "" if one else f"<h3>{escape(history.name)}</h3>"
    found = verdict_of(history)
    told = "".join(f"<li>{escape(str(finding))}</li>" for finding in found.findings)
    text = f"<p><b>{escape(found.label)}</b>: {escape(found.text)}</p>"
    return f"{name}{text}" + (f"<ul>{told}</ul>" if told else "")


def _band(histories: Sequence[History]) -> Band | None:
    """Where the validation losses are expected."""
    cases = [case_of(history.run) for history in histories]
    first = next((case.reference for case in cases), None)
    if first is None or {case.reference and case.reference.preset for case in cases} != {
        first.preset
    }:
        return None
    label = f"val, {first.n_seed} runs of {first.preset}"
    return Band(label, band(first, min(case.eval_tokens for case in cases)))


def _comparison(histories: Sequence[History]) -> str:
    figures = [key_figures(history) for history in histories]
    rows = dict.fromkeys(name for found in figures for name in found)
    return _table(
        ["", *(history.name for history in histories)],
        [[name, *(found.get(name, "") for found in figures)] for name in rows],
        numbers=True,
    )


def _charts(histories: Sequence[History], band: Band | None) -> str:
    one = len(histories) == 1
    per_step = {h.steps[0]["tokens"] / (h.steps[0]["iter"] + 1) for h in histories
                if h.steps and "tokens" in h.steps[0]}  # fmt: skip
    by_tokens = len(per_step) > 1  # steps of different sizes do not compare
    x_label = "tokens" if by_tokens else "step"

    def points(records: Sequence[Mapping[str, Any]], name: str) -> Points:
        x = "tokens" if by_tokens else "iter"
        return [(record[x], record.get(name)) for record in records if x in record]

    def lines(name: str) -> list[Line]:
        return [Line(h.name, points(h.steps, name), i) for i, h in enumerate(histories)]

    losses = []
    for i, history in enumerate(histories):
        of = "" if one else f"{history.name}, "
        train = Line(f"{of}train", points(history.steps, "train_loss"), i, faint=True)
        evaluated = points(history.evaluations, "val_loss")
        losses += [train, Line(f"{of}val", evaluated, 1 if one else i, dots=True)]
    figures = [_figure("loss, nats a token", x_label, losses, band, wide=True)]
    for title, name in (
        ("learning rate", "lr"),
        ("gradient norm, before clipping", "grad_norm"),
        ("tokens a second, while training", "tokens_per_s"),
        ("MFU", "mfu"),
    ):
        figures.append(_figure(title, x_label, lines(name), None, zero=True))
    return "".join(figures)


def _figure(
    title: str,
    x_label: str,
    lines: Sequence[Line],
    band: Band | None,
    *,
    wide: bool = False,
    zero: bool = False,
) -> str:
    drawn = chart(title, x_label, lines, band, zero)
    if not drawn:
        return ""
    keys = [f'<i class="b{line.colour % 6}"></i>{escape(line.label)}' for line in lines]
    if band is not None:
        keys.append(f"<i style='background:var(--soft)'></i>{escape(band.label)}")
    legend = f'<p class="legend">{"".join(keys)}</p>' if len(keys) > 1 else ""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><h3>{escape(title)}</h3>{legend}{drawn}</figure>"


def _phases(history: History, one: bool) -> str:
    seconds = history.seconds
    total = sum(seconds.values())
    if not total:
        return "<p>The run recorded no phases.</p>"
    name = "" if one else f"<h3>{escape(history.name)}</h3>"
    bar = "".join(
        f'<div title="{phase}" '
        f'style="background:var(--{_COLOURS[phase]});flex:{s / total:.5f}"></div>'
        for phase, s in seconds.items()
        if s
    )
    rows = [
        [phase, f"{s:,.1f} s", f"{s / total:.1%}", MEANING[phase]] for phase, s in seconds.items()
    ]
    table = _table(["phase", "seconds", "share", ""], rows)
    return f'{name}<div class="bar">{bar}</div>{table}'


def _samples(history: History, one: bool) -> str:
    name = "" if one else f", {escape(history.name)}"
    parts = [f"<h2>Samples{name}</h2>"]
    for i, sample in enumerate(reversed(history.samples)):
        shown = " open" if i == 0 else ""
        text = escape(str(sample.get("text", "")))
        parts.append(
            f"<details{shown}><summary>after step {sample['iter']:,}</summary><pre>{text}</pre>"
            "</details>"
        )
    return "".join(parts)


def _settings(histories: Sequence[History]) -> str:
    configs = [history.run["config"] for history in histories]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = [[name, *(json.dumps(config.get(name)) for config in configs)] for name in names]
    heads = ["", *(history.name for history in histories)]
    every = f"<details><summary>every setting</summary>{_table(heads, rows)}</details>"
    if len(histories) == 1:
        return every
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return f"{_table(heads, differing)}{every}"


def _environment(history: History, one: bool) -> str:
    rows = []
    for process in history.run.get("processes", []):
        devices = process.get("devices", {})
        versions = process.get("versions", {})
        rows.append([
            str(process.get("started")),
            f"{process.get('steps_done', 0):,}",
            f"{devices.get('count')} x {devices.get('kind')}, {process.get('precision')}",
            f"Python {versions.get('python')}, jax {versions.get('jax')}, code "
            f"{str(process.get('commit'))[:12]}",
            str(process.get("command")),
        ])  # fmt: skip
    name = "" if one else f"<h3>{escape(history.name)}</h3>"
    data = history.run["data"]
    splits = ", ".join(
        f"{split} {found.get('tokens', 0):,} tokens (sha256 {str(found.get('sha256'))[:12]}...)"
        for split, found in data.get("splits", {}).items()
    )
    table = _table(["started", "at step", "on", "with", "command"], rows)
    return f"{name}<p>{escape(str(data.get('name')))}: {escape(splits)}</p>{table}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    cell: Callable[[int], str] = lambda i: ' class="n"' if numbers and i else ""  # noqa: E731
    head = "".join(f"<th{cell(i)}>{escape(text)}</th>" for i, text in enumerate(heads))
    lines = [
        "<tr>"
        + "".join(f"<td{cell(i)}>{escape(text)}</td>" for i, text in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
