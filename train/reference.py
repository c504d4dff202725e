"""What a recipe's loss curve is, and in which band runs of it lie: made of runs of its own.

A reference is a file of the package, `train/references/<preset>.json`, written by
`scripts/benchmarks/reference.py`; it names its seeds, settings, data and versions. There is one for
presets whose data is the same on every machine and that have been run to their end.
"""

import dataclasses
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from train.config import TrainConfig, with_fields

FORMAT_VERSION = 1
SIGMAS = 4.0
"""Half the band's width, in standard deviations of what a sound run's mean may be off by."""
LEAST = 0.01
"""And what is added to it, in nats: below that nothing is worth a word."""

# Where a run goes and how it is looked at, not what it computes.
_INDIFFERENT = frozenset({
    "out_dir", "data_dir", "seed", "micro_batch_size", "batch_size", "gradient_accumulation_steps",
    "eval_interval", "eval_iters", "eval_only", "target_val_loss", "log_interval",
    "sample_interval", "always_save_checkpoint", "checkpoint_interval", "checkpoint_minutes",
    "keep_checkpoints", "preemption_s", "precision", "products", "remat", "mesh", "wandb_log",
    "wandb_project", "wandb_run_name", "tensorboard_log", "profile", "skip_spikes", "max_skipped",
})  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps, as sound runs have it: its mean over the seeds, the standard
    deviation between them, and that of a single logged value around its run's own curve."""

    iter: tuple[int, ...]
    mean: tuple[float, ...]
    seeds: tuple[float, ...]
    noise: tuple[float, ...]

    def at(self, step: int) -> tuple[float, float, float]:
        """Mean and both deviations at a step, between the steps known by straight lines."""
        i = bisect_left(self.iter, step)
        if i == 0 or i == len(self.iter):
            i = min(i, len(self.iter) - 1)
            return self.mean[i], self.seeds[i], self.noise[i]
        left, right = self.iter[i - 1], self.iter[i]
        share = (step - left) / (right - left)
        a, b, c = (
            (1 - share) * values[i - 1] + share * values[i]
            for values in (self.mean, self.seeds, self.noise)
        )
        return a, b, c


@dataclass(frozen=True)
class Reference:
    """A recipe that was run.

    - `config`: its settings. `data`: name, tokenizer and hashes of what it was run on.
    - `train_loss`, `grad_norm` (its logarithm), `lr`: of logged steps; `val_loss`: of evaluations
      over `eval_tokens` tokens. Losses in nats a token.
    """

    preset: str
    config: TrainConfig
    data: Mapping[str, Any]
    made_by: Mapping[str, Any]
    n_seed: int
    window: int
    eval_tokens: int
    token_deviation: float
    train_loss: Curve
    val_loss: Curve
    grad_norm: Curve
    lr: Curve

    @property
    def last(self) -> int:
        """The step at which the curve ends."""
        return self.train_loss.iter[-1]


@dataclass(frozen=True)
class Place:
    """Where a run lies at a step: the value found, and the band it should be in."""

    what: str
    step: int
    value: float
    low: float
    high: float
    n_seed: int

    @property
    def excess(self) -> float:
        """How far above the band; negative below it, 0 within."""
        return max(self.value - self.high, 0.0) + min(self.value - self.low, 0.0)

    def __str__(self) -> str:
        where = "in"
        if self.excess:
            where = f"{abs(self.excess):.2f} {'above' if self.excess > 0 else 'below'}"
        return (
            f"{self.what} {self.value:.3f} at step {self.step:,}, {where} the band {self.low:.3f} "
            f"to {self.high:.3f}"
        )


def decisive(config: TrainConfig) -> dict[str, Any]:
    """The settings that a curve depends on, seeds and rounding apart."""
    fields = dataclasses.asdict(config)
    kept = {name: value for name, value in fields.items() if name not in _INDIFFERENT}
    return {**kept, "global_batch_size": config.global_batch_size}


def load_reference(preset: str) -> Reference | None:
    """The preset's, None if it has none."""
    file = resources.files("train") / "references" / f"{preset}.json"
    return parse_reference(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def reference_of(preset: str | None, config: TrainConfig) -> Reference | None:
    """The one of the preset that a run was started from; where none was named, of the recipe that
    its settings are, to the letter."""
    if preset is not None:
        return load_reference(preset)
    files = (resources.files("train") / "references").iterdir()
    for name in sorted(file.name for file in files):
        if not name.endswith(".json"):
            continue
        found = load_reference(name.removesuffix(".json"))
        if found is not None and decisive(found.config) == decisive(config):
            return found
    return None


def parse_reference(content: Mapping[str, Any]) -> Reference:
    """ValueError for a file of another format."""
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"a reference of format_version {content.get('format_version')!r}, expected "
            f"{FORMAT_VERSION}; make it anew: python scripts/benchmarks/reference.py"
        )
    fields = {field.name: content[field.name] for field in dataclasses.fields(Reference)}
    fields["config"] = with_fields(TrainConfig(), content["config"], content["preset"])
    for name in ("train_loss", "val_loss", "grad_norm", "lr"):
        fields[name] = Curve(**{key: tuple(values) for key, values in content[name].items()})
    return Reference(**fields)


def place_train(reference: Reference, steps: Sequence[Mapping[str, Any]]) -> Place | None:
    """Of the mean loss of the lines of the last steps; None while there are too few."""
    lines = _recent(reference, steps, "train_loss")
    if len(lines) < 4:
        return None
    known = [reference.train_loss.at(step) for step, _ in lines]
    n = len(lines)
    noise = math.sqrt(sum(noise**2 for _, _, noise in known)) / n
    seeds = sum(seeds for _, seeds, _ in known) / n
    value, mean = sum(loss for _, loss in lines) / n, sum(mean for mean, _, _ in known) / n
    what = f"train loss (mean of {n} lines)"
    return _placed(reference, what, lines[-1][0], value, mean, seeds, noise)


def place_val(reference: Reference, evaluation: Mapping[str, Any], n_tokens: int) -> Place | None:
    """Of an evaluation over so many tokens, which may be others than the reference's."""
    step, loss = evaluation["iter"], evaluation.get("val_loss")
    if loss is None or not reference.val_loss.iter[0] <= step <= reference.last + 1:
        return None
    mean, seeds, _ = reference.val_loss.at(step)
    noise = 0.0
    if n_tokens != reference.eval_tokens:
        noise = reference.token_deviation * math.sqrt(1 / n_tokens + 1 / reference.eval_tokens)
    return _placed(reference, "validation loss", step, loss, mean, seeds, noise)


def grad_norm_ratio(reference: Reference, steps: Sequence[Mapping[str, Any]]) -> float | None:
    """How many times the reference's the gradient's norm is, in the geometric mean of the lines of
    the last steps; None within what runs differ by."""
    lines = _recent(reference, steps, "grad_norm")
    if len(lines) < 4 or any(norm <= 0 for _, norm in lines):
        return None
    known = [reference.grad_norm.at(step) for step, _ in lines]
    off = sum(math.log(norm) for _, norm in lines) - sum(mean for mean, _, _ in known)
    spread = max(seeds + noise for _, seeds, noise in known)
    off /= len(lines)
    return math.exp(off) if abs(off) > max(SIGMAS * spread, math.log(1.5)) else None


def steps_to(reference: Reference, val_loss: float) -> int | None:
    """After how many steps its runs' mean validation loss is at most this; None: never."""
    curve = reference.val_loss
    return next(
        (i for i, mean in zip(curve.iter, curve.mean, strict=True) if mean <= val_loss), None
    )


def band(reference: Reference, n_tokens: int) -> list[tuple[int, float, float]]:
    """Where the validation loss of evaluations over so many tokens is expected."""
    places = (
        place_val(reference, {"iter": step, "val_loss": 0.0}, n_tokens)
        for step in reference.val_loss.iter
    )
    return [(place.step, place.low, place.high) for place in places if place is not None]


def _placed(
    reference: Reference, what: str, step: int, value: float, mean: float, seeds: float,
    noise: float,
) -> Place:  # fmt: skip
    # The mean of the seeds is itself known from a few.
    deviation = math.sqrt(seeds**2 * (1 + 1 / reference.n_seed) + noise**2)
    half = SIGMAS * deviation + LEAST
    return Place(what, step, value, mean - half, mean + half, reference.n_seed)


def _recent(
    reference: Reference, steps: Sequence[Mapping[str, Any]], name: str
) -> list[tuple[int, float]]:
    """Step and value of the lines within a window's length of the last, and of no fewer than four
    lines, as long as the reference reaches."""
    found: list[tuple[int, float]] = []
    for record in reversed(steps):
        step, value = record["iter"], record.get(name)
        if value is None or step > reference.last:
            break
        if len(found) >= 4 and found[0][0] - step >= reference.window:
            break
        found.append((step, value))
    return found[::-1]
