"""loss.png: the losses of a run, drawn from its metrics.jsonl."""

import json
from pathlib import Path


def plot_losses(run: Path) -> None:
    """Draw `run/loss.png`; nothing if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "train_loss" in record]
    evaluations = [record for record in records if "val_loss" in record]
    if not (steps or evaluations):
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [r["iter"] for r in steps], [r["train_loss"] for r in steps],
        color="tab:blue", alpha=0.5, linewidth=1, label="train, each logged step",
    )  # fmt: skip
    if evaluations:
        axes.plot(
            [r["iter"] for r in evaluations], [r["val_loss"] for r in evaluations],
            color="tab:orange", marker="o", markersize=3, label="val",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(run / ".loss.png.partial"))
    (run / ".loss.png.partial").replace(run / "loss.png")
