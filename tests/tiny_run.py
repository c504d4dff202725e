"""A run that takes seconds: a text, a dataset of it, a model, the commands around them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from train.datasets import prepare
from train.interrupt import Interrupted, Interruption

ROOT = Path(__file__).resolve().parent.parent

TEXT = "".join(
    f"{a} and {b} went up the hill to fetch {i} pails of water;\n"
    for i, (a, b) in enumerate(
        (a, b) for a in ("Jack", "Anna", "Otto", "Emma") for b in ("Jill", "Hugo", "Vera", "Fynn")
    )
) * 5  # fmt: skip

FLAGS = {
    "dataset": "tiny", "n_layer": 1, "n_head": 2, "n_embd": 14, "block_size": 13, "batch_size": 3,
    "gradient_accumulation_steps": 1, "max_iters": 30, "lr_decay_iters": 30, "warmup_iters": 3,
    "learning_rate": 0.01, "min_lr": 0.001, "dropout": 0.1, "eval_interval": 10, "eval_iters": 2,
    "checkpoint_interval": 5,
}  # fmt: skip


def make_dataset(data_dir: Path) -> Path:
    """The dataset `tiny`, of characters; returns `data_dir`."""
    source = data_dir / "tiny.txt"
    data_dir.mkdir(parents=True, exist_ok=True)
    source.write_text(TEXT, encoding="utf-8")
    prepare("text", data_dir, name="tiny", files=(source,), tokenizer="char")
    return data_dir


def command(script: str, *args: object, **flags: object) -> list[str]:
    options = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, str(ROOT / "scripts" / script), *map(str, args), *options]


def start(argv: list[str], cwd: Path) -> subprocess.Popen[str]:
    """A command with pipes, in an environment with no hub and no terminal."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        argv, cwd=cwd, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(argv: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    with start(argv, cwd) as process:
        out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def losses(out_dir: Path) -> dict[tuple[str, int], float]:
    """(kind, iter) -> loss of every line of metrics.jsonl; each may stand there only once."""
    result: dict[tuple[str, int], float] = {}
    for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kind = "val_loss" if "val_loss" in record else "train_loss"
        assert (kind, record["iter"]) not in result
        result[kind, record["iter"]] = record[kind]
    return result


class StopAfter(Interruption):
    """Asks the run to end at its n-th look for a signal."""

    def __init__(self, n: int) -> None:
        super().__init__(lambda: None)
        self.looks_left = n

    def check(self) -> None:
        self.looks_left -= 1
        if self.looks_left < 0:
            raise Interrupted("SIGINT")
