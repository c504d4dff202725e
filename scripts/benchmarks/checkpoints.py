"""What checkpoints cost a run, and what it waits for its data.

A checkpoint stops the steps for a while, and is then written beside them, which slows them. So one
run saves again and again, and the steps right after a save are held against those well after it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import rich.box
import rich.table

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def measure(
    flags: Mapping[str, Any], interval: int, n_save: int, window: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run scripts/train.py with a checkpoint every `window` steps, and see what `cost` says."""
    n_step = window * (n_save + 1)
    say(f"{n_step} steps, a checkpoint every {window}")
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            **flags, "out_dir": scratch, "max_iters": n_step, "log_interval": 1,
            "checkpoint_interval": window, "checkpoint_minutes": 0,
            "eval_interval": 2 * n_step, "eval_iters": 1,
        }  # fmt: skip
        argv = [sys.executable, str(TRAIN), *(f"--{k}={v}" for k, v in settings.items())]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"train.py failed with exit code {done.returncode}: {done.stderr}")
        lines = (Path(scratch) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return cost([json.loads(line) for line in lines], interval, window)


def cost(records: Sequence[Mapping[str, Any]], interval: int, window: int) -> dict[str, Any]:
    """What the lines of metrics.jsonl say, where a checkpoint was begun every `window` steps.

    A step without one is the median over the second halves of the windows; a checkpoint costs
    what its window took over as many of those, the median over the windows after the first.
    `after` are the seconds of the first step after a checkpoint, the second, and so on; that of
    the first has what the checkpoint stopped the run for. Shares are of the time without.
    """
    steps = [record for record in records if "train_loss" in record]
    seconds = [b["elapsed_s"] - a["elapsed_s"] for a, b in pairwise(steps)]
    # Of the first step there is no time; the first window has the start in it.
    windows = [seconds[i - 1 : i - 1 + window] for i in range(window, len(steps), window)]
    step_s = median(value for each in windows for value in each[window // 2 :])
    costs = [sum(each) - window * step_s for each in windows]
    first, last = steps[window - 1], steps[-1]
    return {
        "interval": interval,
        "step_s": step_s,
        "checkpoint_costs_s": costs,
        "checkpoint_blocks_s": (last["checkpoint_s"] - first["checkpoint_s"]) / len(windows),
        "checkpoint_overhead": median(costs) / (interval * step_s),
        "data_wait_share": (last["data_s"] - first["data_s"]) / (last["step_s"] - first["step_s"]),
        "after": [median(values) for values in zip(*windows, strict=True)],
    }


def table(found: Mapping[str, Any]) -> rich.table.Table:
    result = rich.table.Table(
        title=f"a checkpoint every {found['interval']} steps: {found['checkpoint_overhead']:+.2%} "
        f"of the time, each stops the run for {found['checkpoint_blocks_s']:.2f} s; waiting for "
        f"data {found['data_wait_share']:.2%} of the time of steps",
        title_justify="left", box=rich.box.SIMPLE_HEAD,
    )  # fmt: skip
    for name in ("step after a checkpoint", "seconds", "over a step without"):
        result.add_column(name, justify="right")
    for i, value in enumerate(found["after"]):
        result.add_row(str(i + 1), f"{value:.3f}", f"{value - found['step_s']:+.3f}")
    return result
