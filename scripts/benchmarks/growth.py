"""Training as work grows: longer sequences, larger models."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from eqx_gpt.config import GPTConfig
from train.files import write_atomically

# Layers and width, by roughly how many parameters they have with GPT-2's vocabulary.
SIZES = {
    "12M": (4, 192),
    "30M": (6, 384),
    "51M": (8, 512),
    "124M": (12, 768),
    "200M": (16, 896),
    "355M": (24, 1024),
}
SIZES_SEQ = 1024
HEAD_DIM = 64


def longer(config: GPTConfig, block_size: int) -> GPTConfig:
    return dataclasses.replace(config, block_size=block_size)


def larger(config: GPTConfig, size: str) -> GPTConfig:
    """ValueError for a size that is not one of SIZES."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; give some of {', '.join(SIZES)}")
    n_layer, n_embd = SIZES[size]
    return dataclasses.replace(
        config, n_layer=n_layer, n_embd=n_embd, n_head=n_embd // HEAD_DIM, block_size=SIZES_SEQ
    )


def table(points: list[dict[str, Any]]) -> rich.table.Table:
    """The points of `save`."""
    found = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in _HEADINGS:
        found.add_column(name, justify="right")
    for cells in _cells(points):
        found.add_row(*cells)
    return found


_HEADINGS = ("grows", "parameters", "tokens", "contender", "tokens/s", "of the peak", "memory, GiB")


def _cells(points: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for point in points:
        for row in point["contenders"]:
            start = [point["grows"], point["size"], f"{point['seq']:,}", row["name"]]
            if "error" in row:
                rows.append([*start, "failed", "", ""])
                continue
            share = row.get("share_of_matmul_peak")
            memory = row["peak_memory_bytes"]
            rows.append([
                *start,
                f"{row['tokens_per_s']:,.0f}",
                "" if share is None else f"{share:.0%}",
                "" if memory is None else f"{memory / 2**30:.2f}",
            ])  # fmt: skip
    return rows


def save(out: Path, found: dict[str, Any], say: Callable[[str], None]) -> None:
    """growth.json, growth.md and, with matplotlib, growth.png.

    A point is {"grows": "length" or "size", "size", "seq", "contenders": [records of a table]}.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "growth.json", (json.dumps(found, indent=1) + "\n").encode())
    lines = [_HEADINGS, ["---"] * len(_HEADINGS), *_cells(found["points"])]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomically(out / "growth.md", text.encode())
    try:
        _plot(out / "growth.png", found["points"])
    except ImportError:
        say("no plot: matplotlib is not installed (pip install 'eqx-gpt[plot]')")
    say(f"written to {out}")


def _plot(path: Path, points: list[dict[str, Any]]) -> None:
    """Rates and memory against length and against size, doubly logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    for column, (grows, label) in enumerate(
        (("length", "tokens in the sequence"), ("size", "parameters"))
    ):
        of_kind = [point for point in points if point["grows"] == grows]
        names = dict.fromkeys(row["name"] for point in of_kind for row in point["contenders"])
        for name in names:
            found = [
                (point["seq"] if grows == "length" else point["params"], row)
                for point in of_kind
                for row in point["contenders"]
                if row["name"] == name and "error" not in row
            ]
            x = [at for at, _ in found]
            panels[0][column].plot(x, [row["tokens_per_s"] for _, row in found], "o-", label=name)
            memory = [(row["peak_memory_bytes"] or 0) / 2**30 for _, row in found]
            panels[1][column].plot(x, memory, "o-", label=name)
        for row, what in enumerate(("tokens a second", "peak memory, GiB")):
            axes = panels[row][column]
            axes.set_xscale("log", base=2 if grows == "length" else 10)
            axes.set_yscale("log")
            axes.set_ylabel(what)
            axes.grid(visible=True, which="both", alpha=0.3)
        panels[1][column].set_xlabel(label)
    panels[0][0].legend()
    figure.savefig(path, dpi=120)
