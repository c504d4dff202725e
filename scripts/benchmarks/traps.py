"""Wrecked runs and sound ones, told apart? python scripts/benchmarks/traps.py.

Each is a run of scripts/train.py with the preset shakespeare-char-cpu, stopped after the first
fifth of its steps; what it told on the way is read from what it printed. A wreck is found if one of
the names that fit is given; those given before the first step, from settings and data alone, are
counted apart from those that the losses gave. A sound run that told anything is a false alarm.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from scripts.common import parse, run_command  # noqa: E402
from train.manifest import Manifest  # noqa: E402
from train.presets import get_preset  # noqa: E402

PRESET = "shakespeare-char-cpu"
SHARE = 0.2

Spoil = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """A run: flags over the preset's, what is done to the tokens of the two splits, and the names
    that would be right; none of a sound one. `stops`: it is interrupted there and resumed."""

    flags: str = ""
    spoil: Spoil | None = None
    names: tuple[str, ...] = ()
    stops: int | None = None


def _shuffled(train: np.ndarray, val: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).permutation(train), val


def _other_tokenizer(train: np.ndarray, val: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).permutation(int(max(train.max(), val.max())) + 1)
    return train, ids[val].astype(val.dtype)


def _one_batch(train: np.ndarray, val: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return train[:900], val


WRECKED = {
    "learning rate x 10": Case("--learning_rate 1e-2 --min_lr 1e-3", names=("learning_rate",)),
    "learning rate / 10": Case("--learning_rate 1e-4 --min_lr 1e-5", names=("learning_rate",)),
    "batch / 8": Case("--batch_size 3 --block_size 32", names=("tokens_per_step",)),
    "no warm-up": Case("--warmup_iters 0", names=("warmup_iters",)),
    "decay that ends too early": Case("--lr_decay_iters 200", names=("lr_decay_iters",)),
    "shuffled labels": Case("", _shuffled, ("token_order",)),
    "overflow": Case("--z_loss 1e38", names=("overflow", "z_loss")),
    "wrong tokenizer": Case("", _other_tokenizer, ("val_data", "tokenizer")),
    "weight decay x 100": Case("--weight_decay 10", names=("weight_decay",)),
    "the same batch again and again": Case("", _one_batch, ("train_tokens", "memorised")),
    "dropout 0.5": Case("--dropout 0.5", names=("dropout",)),
    "another optimizer at AdamW's rate": Case("--optimizer lion", names=("optimizer",)),
}
SOUND = {
    "seed 11": Case("--seed 11"),
    "seed 12": Case("--seed 12"),
    "seed 13": Case("--seed 13"),
    "another batch x accumulation": Case(
        "--batch_size 6 --gradient_accumulation_steps 2 --seed 14"
    ),
    "4 x 3 sequences": Case("--batch_size 3 --gradient_accumulation_steps 4 --seed 15"),
    "micro_batch_size 4": Case("--micro_batch_size 4 --seed 16"),
    "float32": Case("--precision float32 --seed 17"),
    "a line each step": Case("--log_interval 1 --seed 18"),
    "a line every 50": Case("--log_interval 50 --eval_interval 100 --eval_iters 7 --seed 19"),
    "stopped and resumed": Case("--seed 20 --checkpoint_interval 50", stops=170),
    "a little higher rate": Case("--learning_rate 1.3e-3 --seed 21"),
    "a shorter run": Case("--max_iters 1800 --lr_decay_iters 1800 --warmup_iters 120 --seed 22"),
}


@dataclass(frozen=True)
class Arguments:
    """Trains wrecked and sound runs to a fifth of their steps; JSON on stdout."""

    data_dir: Path = Path("data")
    """Where shakespeare_char is prepared."""
    runs: Path = Path("out/traps")
    """Where the runs go. Those that are there are read, not done again."""
    only: str = ""
    """Those alone whose name this regular expression finds."""
    steps: int = round(SHARE * get_preset(PRESET).max_iters)
    """After which step a run is stopped."""


def main() -> int:
    options, results = parse(Arguments), {}
    for kind, cases in (("wrecked", WRECKED), ("sound", SOUND)):
        for name, case in cases.items():
            if not re.search(options.only, name):
                continue
            place = options.runs / re.sub(r"\W+", "-", name)
            if not (place / "said.txt").exists():
                shutil.rmtree(place, ignore_errors=True)
                train(case, place, options.data_dir, options.steps)
            result = read(case, (place / "said.txt").read_text(encoding="utf-8"))
            print(f"{kind}: {name}: {json.dumps(result)}", file=sys.stderr, flush=True)
            results[name] = {"kind": kind, **result}
    wrecked = [r for r in results.values() if r["kind"] == "wrecked"]
    sound = [r for r in results.values() if r["kind"] == "sound"]
    print(
        json.dumps(
            {
                "wrecked": len(wrecked),
                "named": sum(r["named_at"] is not None for r in wrecked),
                "off_track": sum(r["off_track_at"] is not None for r in wrecked),
                "named_by_losses": sum(r["named_by_losses_at"] is not None for r in wrecked),
                "sound": len(sound),
                "false_alarms": sum(bool(r["told"]) for r in sound),
                "runs": results,
            }
        )
    )
    return 0


def train(case: Case, place: Path, data_dir: Path, steps: int) -> None:
    """A run up to `steps` steps, and what it said, in said.txt; it goes on being the run that it
    is, so its schedule is that of all its steps."""
    place.mkdir(parents=True)
    if case.spoil is not None:
        data_dir = spoilt(case.spoil, data_dir, place / "data")
    command = [sys.executable, "-u", "scripts/train.py", f"--out_dir={(place / 'run').resolve()}"]
    first = [
        f"--preset={PRESET}", f"--data_dir={data_dir.resolve()}", "--dataset=shakespeare_char",
        "--always_save_checkpoint=True", *case.flags.split(),
    ]  # fmt: skip
    said = []
    if case.stops is not None:
        said += until([*command, *first], case.stops)
        first = ["--init_from=resume"]
    said += until([*command, *first], steps)
    (place / "said.txt").write_text("".join(said), encoding="utf-8")
    shutil.rmtree(place / "run" / "checkpoints", ignore_errors=True)


def until(command: list[str], steps: int) -> list[str]:
    """What the command says until it has done so many steps; it is killed then."""
    said = []
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if (found := re.match(r"(iter|eval) (\d+)/", line)) and int(found[2]) > steps:
                break
            said.append(line)
        process.kill()
    return said


def spoilt(spoil: Spoil, data_dir: Path, target: Path) -> Path:
    """The dataset with other tokens, under its own name and with a manifest that fits."""
    data = Manifest.read(data_dir / "shakespeare_char")
    place = target / data.name
    place.mkdir(parents=True)
    meta = data.to_dict()
    for split, tokens in zip(
        ("train", "val"), spoil(*(np.array(data.tokens(s)) for s in ("train", "val"))), strict=True
    ):
        content = tokens.astype(f"<u{np.dtype(data.dtype).itemsize}").tobytes()
        (place / f"{split}.bin").write_bytes(content)
        meta["splits"][split] |= {
            "tokens": len(tokens),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    (place / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return target


def read(case: Case, said: str) -> dict[str, Any]:
    """What was told and after which step; `_by_losses`: once there were some."""
    step, told = 0, []
    named_at = by_losses = off_track_at = None
    begun = False
    for line in said.splitlines():
        if found := re.match(r"(iter|eval) (\d+)/", line):
            step, begun = int(found[2]), True
        if line.startswith("OFF TRACK"):
            off_track_at = step if off_track_at is None else off_track_at
        if found := re.match(r"\s*(?:WATCH OUT|NOTE) \((\w+)\)", line):
            told.append([step, found[1]])
            if found[1] in case.names:
                named_at = step if named_at is None else named_at
                if begun:
                    by_losses = step if by_losses is None else by_losses
    return {
        "named_at": named_at,
        "named_by_losses_at": by_losses,
        "off_track_at": off_track_at,
        "told": [[step, name] for step, name in told] + (
            [] if off_track_at is None else [[off_track_at, "OFF TRACK"]]
        ),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
