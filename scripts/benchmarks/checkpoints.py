"""What checkpoints cost a run, and what it waits for its data: runs with and without, in turn."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import rich.box
import rich.table

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def measure(
    flags: Mapping[str, Any], interval: int, n_round: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds of `2 * interval` steps of scripts/train.py, after `interval` others.

    `with` begins a checkpoint before the first and in the middle of them, `without` none. Medians
    over the rounds; shares are of the time without.
    """
    rounds: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    for i in range(n_round):
        for kind, found in rounds.items():
            say(f"{kind} checkpoints, round {i + 1} of {n_round}")
            found.append(_run(flags, interval, interval if kind == "with" else 4 * interval))
    medians = {
        kind: {name: median(found[name] for found in runs) for name in runs[0]}
        for kind, runs in rounds.items()
    }
    wall = medians["without"]["elapsed_s"]
    return {
        "interval": interval,
        "seconds": medians,
        "rounds": rounds,
        "checkpoint_overhead": medians["with"]["elapsed_s"] / wall - 1,
        "checkpoint_blocks_s": medians["with"]["checkpoint_s"] / 2,
        "data_wait_share": medians["without"]["data_s"] / medians["without"]["step_s"],
    }


def spent(records: Sequence[Mapping[str, Any]], interval: int) -> dict[str, float]:
    """Seconds by phase from the end of step `interval` to that of step `3 * interval`."""
    steps = {record["iter"]: record for record in records if "train_loss" in record}
    first, last = steps[interval - 1], steps[3 * interval - 1]
    names = [name for name in last if name.endswith("_s") and name != "tokens_per_s"]
    return {name: last[name] - first[name] for name in names}


def table(found: dict[str, Any]) -> rich.table.Table:
    result = rich.table.Table(
        title=f"{2 * found['interval']} steps, a checkpoint every {found['interval']}: "
        f"{found['checkpoint_overhead']:+.1%} of the time, each blocks "
        f"{found['checkpoint_blocks_s']:.2f} s; waiting for data {found['data_wait_share']:.2%} "
        "of the time of steps",
        title_justify="left", box=rich.box.SIMPLE_HEAD,
    )  # fmt: skip
    for name in ("phase", "with", "without"):
        result.add_column(name, justify="left" if name == "phase" else "right")
    for name in found["seconds"]["with"]:
        seconds = (found["seconds"][kind][name] for kind in ("with", "without"))
        result.add_row(name.removesuffix("_s"), *(f"{s:.2f} s" for s in seconds))
    return result


def _run(flags: Mapping[str, Any], interval: int, checkpoint_interval: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            **flags, "out_dir": scratch, "max_iters": 3 * interval, "log_interval": 1,
            "checkpoint_interval": checkpoint_interval, "checkpoint_minutes": 0,
            "eval_interval": 4 * interval, "eval_iters": 1,
        }  # fmt: skip
        argv = [sys.executable, str(TRAIN), *(f"--{k}={v}" for k, v in settings.items())]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"train.py failed with exit code {done.returncode}: {done.stderr}")
        lines = (Path(scratch) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return spent([json.loads(line) for line in lines], interval)
