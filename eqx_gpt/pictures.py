"""Pictures of what `inspect`, `attribution` and `paths` show, drawn by matplotlib (`.[plot]`).

Each function returns a figure: a notebook shows it, `figure.savefig("name.png")` writes it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_picture(
    weights: Mapping[str, Float[np.ndarray, "seq seq"]], labels: Sequence[str] | None = None
) -> "Figure":
    """Attention weights, query by key: one square a title. `labels` are the positions' names."""
    figure = _figure(4.2 * len(weights), 4.4)
    for i, (title, square) in enumerate(weights.items()):
        axes = figure.add_subplot(1, len(weights), i + 1)
        axes.imshow(np.asarray(square), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        axes.set(title=title, xlabel="looks at", ylabel="from" if i == 0 else "")
        if labels is not None:
            ticks = range(len(labels))
            shown = [_visible(label) for label in labels]
            axes.set_xticks(ticks, shown, rotation=90, fontsize=7)
            axes.set_yticks(ticks, shown, fontsize=7)
        _as_written(axes)
    return figure


def heads_picture(
    values: Mapping[str, Float[np.ndarray, "layer head"]], unit: str = ""
) -> "Figure":
    """One number for every head: a grid a title, white at 0, all on one scale."""
    grids = {title: np.asarray(grid) for title, grid in values.items()}
    largest = max(float(np.abs(grid).max()) for grid in grids.values())
    n_layer, n_head = next(iter(grids.values())).shape
    figure = _figure((1.2 + 0.28 * n_head) * len(grids) + 1, 1.2 + 0.2 * n_layer)
    image: Any = None
    every = [figure.add_subplot(1, len(grids), i + 1) for i in range(len(grids))]
    for axes, (title, grid) in zip(every, grids.items(), strict=True):
        image = axes.imshow(grid, vmin=-largest, vmax=largest, cmap="RdBu_r", aspect="auto")
        axes.set(title=title, xlabel="head", ylabel="layer")
        _as_written(axes)
    figure.colorbar(image, ax=every, label=unit)
    return figure


def lens_picture(
    probabilities: Float[np.ndarray, "row seq"],
    texts: Sequence[Sequence[str]],
    labels: Sequence[str],
) -> "Figure":
    """A logit lens: for every layer (rows, the first one at the bottom) and position the likeliest
    token in `texts` and its probability. `labels` are the tokens read."""
    probabilities = np.asarray(probabilities)
    n_row, seq = probabilities.shape
    figure = _figure(1 + 0.8 * seq, 1 + 0.25 * n_row)
    axes = figure.add_subplot()
    image = axes.imshow(probabilities, vmin=0, vmax=1, cmap="Greens", aspect="auto", origin="lower")
    for row, col in np.ndindex(n_row, seq):
        color = "white" if probabilities[row, col] > 0.6 else "black"
        token: Any = texts[row][col]
        text: Any = _visible(token)
        axes.text(
            col, row, text, ha="center", va="center", fontsize=6, color=color,
            parse_math=False,
        )  # fmt: skip
    axes.set_xticks(
        range(seq), [_visible(label) for label in labels], rotation=45, ha="right", fontsize=7
    )
    axes.set(ylabel="after block")
    _as_written(axes)
    figure.colorbar(image, ax=axes, label="probability")
    return figure


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'eqx-gpt[plot]'") from None
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _visible(token: str) -> str:
    """Spaces and ends of lines are tokens too."""
    return token.replace(" ", "·").replace("\n", "↵")


def _as_written(axes: Any) -> None:
    """Tokens may hold dollar signs, which matplotlib takes for mathematics."""
    for text in (axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)
