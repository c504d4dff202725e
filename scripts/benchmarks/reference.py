"""Makes a preset's reference curve: python scripts/benchmarks/reference.py --preset NAME.

Trains the preset once for each seed, with a line for every step and forty evaluations, and writes
their mean and spread to train/references/NAME.json. Runs that are in --runs already, whole, are
taken as they are; one that was interrupted goes on.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from scripts.common import parse, run_command  # noqa: E402
from train.files import write_atomically  # noqa: E402
from train.history import History, read_history  # noqa: E402
from train.presets import get_preset  # noqa: E402
from train.reference import FORMAT_VERSION  # noqa: E402
from train.run import has_checkpoint, has_run  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Makes a preset's reference curve, of runs of its own."""

    preset: str
    """The preset. Its data has to be the same on every machine."""
    seeds: tuple[int, ...] = (1337, 1, 2, 3, 4)
    """One run each."""
    data_dir: str = "data"
    """Where the prepared dataset is."""
    runs: Path = Path("out/references")
    """Where the runs go, as <preset>/<seed>."""


def main() -> int:
    options = parse(Arguments)
    config = get_preset(options.preset)
    if config.dataset == "stdlib" or config.init_from != "scratch":
        raise ValueError(
            f"{options.preset!r} has no reference: it starts from other weights, or its data "
            "differs by machine"
        )
    if len(options.seeds) < 3:
        raise ValueError(f"a band needs at least 3 seeds, got {len(options.seeds)}")
    directories = [options.runs / options.preset / str(seed) for seed in options.seeds]
    for seed, directory in zip(options.seeds, directories, strict=True):
        train(options, seed, directory, config.max_iters)
    content = reference([read_history(directory) for directory in directories], options.preset)
    target = ROOT / "train" / "references" / f"{options.preset}.json"
    write_atomically(target, text_of(content).encode())
    print(f"written to {target}", file=sys.stderr)
    return 0


def train(options: Arguments, seed: int, directory: Path, max_iters: int) -> None:
    if has_run(directory) and read_history(directory).steps_done == max_iters:
        return
    command = [sys.executable, "scripts/train.py", f"--out_dir={directory.resolve()}"]
    if has_checkpoint(directory):
        command += ["--init_from=resume"]
    else:
        command += [
            f"--preset={options.preset}", f"--seed={seed}", "--log_interval=1",
            f"--data_dir={Path(options.data_dir).resolve()}", "--target_val_loss=None",
            f"--eval_interval={max(1, max_iters // 40)}", "--always_save_checkpoint=True",
            f"--dataset={get_preset(options.preset).dataset}",
            f"--checkpoint_interval={max_iters}",
        ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)


def reference(histories: Sequence[History], preset: str) -> dict[str, Any]:
    """The content of the file. ValueError for runs that do not belong together."""
    runs = [history.run for history in histories]
    config = {**runs[0]["config"]}
    hashes = {json.dumps(run["data"]["splits"], sort_keys=True) for run in runs}
    n_step = {len(history.steps) for history in histories}
    if len(hashes) > 1 or n_step != {config["max_iters"]}:
        raise ValueError("the runs are of different data, or lack steps")
    process, data = runs[0]["processes"][-1], runs[0]["data"]
    n_step, tokens = config["max_iters"], config["batch_size"] * config["block_size"]
    steps = [history.steps for history in histories]
    train_loss = of_steps(steps, "train_loss")
    per_step = tokens * config["gradient_accumulation_steps"]
    kept = ("vocab_size", "tokenizer_fingerprint", "splits", "name")
    return {
        "format_version": FORMAT_VERSION,
        "preset": preset,
        "config": {**config, "out_dir": f"out/{preset}", "data_dir": "data"},
        "data": {name: data[name] for name in kept},
        "made_by": {
            "seeds": [run["config"]["seed"] for run in runs],
            "precision": process["precision"],
            "devices": process["devices"]["kind"],
            "versions": process["versions"],
            "commit": process["commit"],
        },
        "n_seed": len(runs),
        "window": max(20, round(0.05 * n_step)),
        "eval_tokens": min(config["eval_iters"] * tokens, data["splits"]["val"]["tokens"]),
        "token_deviation": round(float(np.median(train_loss["noise"])) * per_step**0.5, 4),
        "train_loss": train_loss,
        "val_loss": of_evaluations([history.evaluations for history in histories]),
        "grad_norm": of_steps(steps, "grad_norm", np.log),
        "lr": of_steps(steps[:1], "lr"),
    }


def of_steps(
    runs: Sequence[Sequence[dict[str, Any]]], name: str, of: Callable[[Any], Any] = np.asarray
) -> dict[str, Any]:
    """A curve by straight lines fitted to the steps around each point, run by run."""
    values = of(np.array([[record[name] for record in run] for run in runs], np.float64))
    n_step, points = values.shape[1], []
    while not points or points[-1] < n_step - 1:
        last = points[-1] if points else -1
        points.append(min(n_step - 1, last + max(1, round(min(last / 16, n_step / 80)))))
    fitted, noise = [], []
    for point in points:
        reach = round(min(0.12 * point, n_step / 40))
        around = np.arange(max(0, point - reach), min(n_step, point + reach + 1))
        if len(around) < 5:
            fitted.append(values[:, point])
            noise.append(np.nan)
            continue
        lines = np.polyfit(around - point, values[:, around].T, 1)
        fitted.append(lines[1])
        rest = values[:, around] - (lines[1][:, None] + lines[0][:, None] * (around - point))
        noise.append(np.sqrt(np.mean(rest**2) * len(around) / (len(around) - 2)))
    known = np.array(noise)
    known[np.isnan(known)] = known[~np.isnan(known)][0]
    return curve(points, np.array(fitted).T, known)


def of_evaluations(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    values = np.array([[record["val_loss"] for record in run] for run in runs])
    points = [record["iter"] for record in runs[0]]
    return curve(points, values, np.zeros(len(points)))


def curve(points: Sequence[int], values: np.ndarray, noise: np.ndarray) -> dict[str, Any]:
    """A few seeds say little of the spread at one point, so it is that of the points around."""
    spread = np.zeros(len(points))
    if len(values) > 1:
        squares = np.var(values, axis=0, ddof=1)
        spread = np.sqrt([np.mean(squares[max(0, i - 3) : i + 4]) for i in range(len(points))])
    rounded: Callable[[np.ndarray], list[float]] = lambda x: [float(f"{y:.5g}") for y in x]  # noqa: E731
    return {
        "iter": list(points),
        "mean": rounded(values.mean(axis=0)),
        "seeds": rounded(spread),
        "noise": rounded(noise),
    }


def text_of(content: dict[str, Any]) -> str:
    """JSON with a line for each field, and for each part of a curve."""
    curves = ("train_loss", "val_loss", "grad_norm", "lr")
    lines = []
    for name, value in content.items():
        text = json.dumps(value)
        if name in curves:
            parts = [f"    {json.dumps(key)}: {json.dumps(part)}" for key, part in value.items()]
            text = "{\n" + ",\n".join(parts) + "\n  }"
        lines.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
