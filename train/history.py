"""What a run has done so far, as its directory tells; of a run in progress, too."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.clock import PHASES, TRAINING, Phase
from train.run import RunError, read_run

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class History:
    """The records of metrics.jsonl by kind, in order, the samples of text, and run.json."""

    directory: Path
    run: Mapping[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest record; empty if there is none."""
        ends = [records[-1] for records in (self.steps, self.evaluations) if records]
        return max(ends, key=lambda record: record.get("elapsed_s", 0.0), default={})

    @property
    def steps_done(self) -> int:
        done = self.steps[-1]["iter"] + 1 if self.steps else 0
        return max(done, self.evaluations[-1]["iter"] if self.evaluations else 0)

    @property
    def seconds(self) -> dict[Phase, float]:
        """By phase; empty if the run recorded none."""
        found: dict[Phase, float] = {}
        for phase in PHASES:
            if (s := self.last.get(f"{phase}_s")) is not None:
                found[phase] = float(s)
        return found

    def mean_rate(self) -> tuple[float, float | None] | None:
        """Tokens a second of training, and MFU, over the whole run; None before the first step."""
        training = sum(self.seconds.get(phase, 0.0) for phase in TRAINING)
        tokens, flops = self.last.get("tokens", 0), self.last.get("flops", 0.0)
        if not (tokens and training):
            return None
        peaks = [
            step["tokens_per_s"] * flops / tokens / step["mfu"]
            for step in self.steps
            if step["mfu"]
        ]
        return tokens / training, flops / training / peaks[-1] if peaks else None


def read_history(directory: str | Path) -> History:
    """RunError if there is no run, or if it has not logged anything yet."""
    directory = Path(directory)
    run = read_run(directory)
    records = _lines(directory / "metrics.jsonl")
    if not records:
        raise RunError(f"{str(directory)!r} has logged no step yet; look again when it has")
    steps = [record for record in records if "train_loss" in record]
    evaluations = [record for record in records if "val_loss" in record]
    done = max(record["iter"] for record in records) + 1
    # Steps that were done again drew the same sample again.
    samples = {sample["iter"]: sample for sample in _lines(directory / SAMPLES)}
    kept = [samples[i] for i in sorted(samples) if i <= done]
    return History(directory, run, steps, evaluations, kept)


def add_sample(directory: Path, step: int, text: str) -> None:
    with (directory / SAMPLES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"iter": step, "text": text}) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines; the last may be half written."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("iter"), int):
            records.append(record)
    return records
