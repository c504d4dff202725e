"""Is a run's curve normal? If not: what differs from the recipe, and which of that is proven.

Pure functions of what a run directory says: settings, data, and the lines of metrics.jsonl. With a
reference (see `reference.py`) the losses are held against its band, and what lies outside is
explained by what differs from the recipe, the largest departure first. The other checks need none.
Every check is a row of one of the tables below.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from train.config import TrainConfig, with_fields
from train.finding import Finding
from train.presets import PRESETS
from train.reference import (
    Place,
    Reference,
    decisive,
    grad_norm_ratio,
    place_train,
    place_val,
    reference_of,
)

Standing = Literal["on track", "better", "off track", "suspect", "nothing wrong", "unknown"]
_LABELS: Mapping[Standing, str] = {
    "on track": "on track",
    "better": "better than the reference",
    "off track": "OFF TRACK",
    "suspect": "SUSPECT DATA",
    "nothing wrong": "nothing wrong so far",
    "unknown": "too early to say",
}
_ORDER = 0.02
"""Of a text whose tokens lie in order, the token before tells more than so many nats."""
_RECENT = 8
"""Lines of steps whose mean is judged where there is no reference."""


@dataclass(frozen=True)
class Case:
    """What is known of a run besides its metrics.

    - `recipe`: the settings it is compared with: the reference's, the preset's, or None.
    - `reference`: only where the run's data is the reference's, for others have another curve.
    - `data`: findings about the data, and why there is no reference, if that is known.
    """

    config: TrainConfig
    vocab_size: int
    statistics: Mapping[str, float] | None
    recipe: TrainConfig | None
    reference: Reference | None
    data: tuple[Finding, ...]
    without: str
    eval_tokens: int


@dataclass(frozen=True)
class Verdict:
    """`text` is one sentence; `findings` say what is wrong, the likeliest reason first."""

    step: int
    standing: Standing
    text: str
    findings: tuple[Finding, ...] = ()

    @property
    def label(self) -> str:
        return _LABELS[self.standing]

    def lines(self) -> list[str]:
        """For a person: the sentence, and one line a finding."""
        told = (f"  WATCH OUT {finding}" for finding in self.findings)
        return [f"{self.label}: {self.text}", *told]


def case_of(run: Mapping[str, Any]) -> Case:
    """Of the content of a run's run.json."""
    config = with_fields(TrainConfig(), run["config"], "run.json")
    preset, data = run.get("preset"), run["data"]
    reference = reference_of(preset, config) if config.init_from == "scratch" else None
    recipe = PRESETS.get(preset or "") if reference is None else reference.config
    found, without = list(_data_alone(run)), "this run's recipe has no reference curve"
    if reference is not None:
        differing = _data_differs(reference, data)
        if differing:
            without = f"the reference curve of {reference.preset} is of other data"
            if data["name"] == reference.data["name"]:
                found += differing
            reference = None
    splits = data["splits"]
    rows = config.eval_iters * config.batch_size
    eval_tokens = min(rows * config.block_size, splits["val"]["tokens"])
    if config.target_val_loss is not None:
        eval_tokens = splits["val"]["tokens"]
    return Case(
        config, run["model"]["vocab_size"], run.get("statistics"), recipe, reference,
        tuple(found), without, eval_tokens,
    )  # fmt: skip


def judge(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Verdict:
    """How the run stands after its newest line. `steps` need not hold more than the first line and
    the last hundred."""
    if not steps and not evaluations:
        return Verdict(0, "unknown", "no step has been logged yet")
    step = max(record["iter"] for record in [*steps[-1:], *evaluations[-1:]])
    alone = [found for check in _ALONE if (found := check(case, steps, evaluations)) is not None]
    places = [] if case.reference is None else _places(case, case.reference, steps, evaluations)
    above = [place for place in places if place.excess > 0]
    if above or alone:
        # What was seen in the losses themselves explains more than any setting.
        causes = [*case.data, *alone]
        if above:
            causes += _causes(case, steps, places)
            text = "; ".join(map(str, above))
        else:
            text = "; ".join(found.text for found in alone)
        findings = tuple({found.name: found for found in reversed(causes)}.values())[::-1]
        return Verdict(step, "off track", text, findings)
    if not places:
        standing: Standing = "nothing wrong" if len(steps) >= 4 else "unknown"
        if case.data:
            standing = "suspect"
        why = case.without if case.reference is None else "too few lines to compare yet"
        return Verdict(step, standing, f"{_last_losses(steps, evaluations)}; {why}", case.data)
    below = [place for place in places if place.excess < 0]
    text = "; ".join(map(str, below or places)) + f" of {places[0].n_seed} seeds"
    return Verdict(step, "better" if below else "on track", text, case.data)


def _places(
    case: Case,
    reference: Reference,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
) -> list[Place]:
    """Of the train loss, and of the last evaluation as long as it is not long ago."""
    train = place_train(reference, steps)
    val = None
    if evaluations:
        val = place_val(reference, evaluations[-1], case.eval_tokens)
        newest = steps[-1]["iter"] if steps else 0
        if val is not None and newest - val.step > max(reference.window, case.config.eval_interval):
            val = None
    return [place for place in (train, val) if place is not None]


# What can be seen without a reference.


def _not_finite(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Finding | None:
    skipped = steps[-1].get("skipped", 0) if steps else 0
    broken = [r["iter"] for r in steps[-_RECENT:] if r.get("train_loss") is None or
              r.get("grad_norm") is None]  # fmt: skip
    if not broken and skipped < 3:
        return None
    guilty = [
        f"{name}={value:g}"
        for name in ("z_loss", "learning_rate")
        if (value := getattr(case.config, name)) > 1
    ]
    why = f"; {' and '.join(guilty)} is far beyond what is usual" if guilty else (
        "; try --precision float32, a lower --learning_rate, --grad_clip 1"
    )  # fmt: skip
    where = f"at step {broken[-1]:,}, " if broken else ""
    return Finding(
        "overflow", f"the loss or its gradient is not finite {where}{skipped} steps skipped{why}"
    )


def _initial_loss(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Finding | None:
    config = case.config
    if config.init_from != "scratch" or not steps or steps[0]["iter"] != 0:
        return None
    if config.z_loss or config.label_smoothing:  # they are in the loss
        return None
    loss, expected = steps[0].get("train_loss"), math.log(case.vocab_size)
    if loss is None or -0.5 < loss - expected < 1.0:
        return None
    what = "the initial weights are too large" if loss > expected else (
        "the targets can be seen in the inputs, or the weights were trained before"
    )  # fmt: skip
    return Finding(
        "initial_loss",
        f"the loss at step 0 is {loss:.2f}, that of a new model ln({case.vocab_size}) = "
        f"{expected:.2f}: {what}",
    )


def _stuck(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Finding | None:
    """No better than guessing from the tokens' frequencies, or not learning at all."""
    losses = [(r["iter"], r["train_loss"]) for r in steps if r.get("train_loss") is not None]
    warm = case.config.warmup_iters if case.config.decay_lr else 0
    if len(losses) < _RECENT or losses[-1][0] < max(100, warm):
        return None
    if all(record["lr"] == 0 for record in steps[-_RECENT:]):
        return Finding("learning_rate", "the learning rate is 0: nothing is learnt")
    last = losses[-1][0]
    reach = max(50, last - losses[-_RECENT][0] + 1)
    recent = [loss for step, loss in losses if step > last - reach]
    before = [loss for step, loss in losses if last - 2 * reach < step <= last - reach]
    if case.config.init_from != "scratch" or len(before) < len(recent) // 2:
        return None
    mean, earlier = sum(recent) / len(recent), sum(before) / max(len(before), 1)
    entropy = None if case.statistics is None else case.statistics["entropy"]
    if entropy is not None and abs(mean - entropy) < 0.04 and abs(mean - earlier) < 0.04:
        order = case.statistics["train_order"] if case.statistics is not None else 1.0
        why = f"shuffling its tokens would change nothing ({order:.3f} nats)"
        if order >= _ORDER:
            why = "the learning rate may be too low, or far too high"
        return Finding(
            "token_order" if order < _ORDER else "no_context",
            f"the loss stays at {mean:.2f}, the entropy of the tokens' frequencies "
            f"({entropy:.2f}): nothing is learnt from the tokens before; {why}",
        )
    first = losses[0]
    if first[0] == 0 and min(mean, earlier) > first[1] - 0.1:
        return Finding(
            "not_falling", f"the loss is {mean:.2f} after {last:,} steps, {first[1]:.2f} at first"
        )
    return None


def _diverged(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Finding | None:
    recent = [r["train_loss"] for r in steps[-_RECENT:] if r.get("train_loss") is not None]
    before = [r["train_loss"] for r in steps[:-_RECENT] if r.get("train_loss") is not None]
    if len(recent) < _RECENT or len(before) < _RECENT:
        return None
    best = min(
        sum(before[i : i + _RECENT]) / _RECENT for i in range(len(before) - _RECENT + 1)
    )  # fmt: skip
    mean = sum(recent) / len(recent)
    if mean < best + 0.7:
        return None
    return Finding(
        "diverged",
        f"the loss rose from {best:.2f} to {mean:.2f}; a lower --learning_rate, or a resumed run "
        "with --skip_spikes 10",
    )


def _memorised(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Finding | None:
    """Far better on what it trains on than on the rest."""
    if not evaluations:
        return None
    val, train = evaluations[-1].get("val_loss"), evaluations[-1].get("eval_train_loss")
    if val is None or train is None or val - train < max(0.5, 0.25 * val):
        return None
    statistics = case.statistics
    if statistics is not None and _other_tokens(statistics):
        return None  # and said so
    return Finding(
        "memorised",
        f"validation loss {val:.2f}, {train:.2f} on what it trains on: it learns its training "
        "text by heart, or the validation split is of another kind",
    )


def _clipped(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Finding | None:
    """A gradient that grows without end."""
    norms = [r["grad_norm"] for r in steps if r.get("grad_norm")]
    if len(norms) < 3 * _RECENT:
        return None
    early, recent = sorted(norms[:_RECENT]), sorted(norms[-_RECENT:])
    ratio = recent[_RECENT // 2] / early[_RECENT // 2]
    clip = case.config.grad_clip
    if ratio < 30 or (clip and recent[0] < clip):
        return None
    return Finding(
        "grad_norm",
        f"the gradient's norm has grown {ratio:.0f}-fold, to {recent[_RECENT // 2]:.3g}"
        + (f", and is cut to grad_clip={clip:g} at every step" if clip else ""),
    )


_ALONE = (_not_finite, _initial_loss, _diverged, _stuck, _memorised, _clipped)


# What is wrong with the data, whatever the losses.


def _other_tokens(statistics: Mapping[str, float]) -> bool:
    """Are the validation split's tokens of another kind than the training split's?"""
    return statistics["divergence"] > 0.5 + 4 * statistics["usual_divergence"]


def _data_alone(run: Mapping[str, Any]) -> list[Finding]:
    statistics = run.get("statistics")
    if statistics is None:
        return []
    found = []
    for split in ("train", "val"):
        if (order := statistics[f"{split}_order"]) < _ORDER and statistics["entropy"] > 0.1:
            found.append(
                Finding(
                    "token_order",
                    f"the {split} split's order is lost: a token tells {max(order, 0):.3f} nats of "
                    "the next, as in a shuffled text; prepare the dataset anew",
                )
            )
    if _other_tokens(statistics):
        found.append(
            Finding(
                "val_data",
                "the validation split's tokens are not distributed like the training split's "
                f"({statistics['divergence']:.2f} nats apart; two halves of that are "
                f"{statistics['usual_divergence']:.2f}): another tokenizer, or another text; "
                "prepare both splits anew",
            )
        )
    known = run["data"]["vocab_size"]
    if statistics["largest_id"] >= known:
        found.append(
            Finding(
                "tokenizer",
                f"the training split has the token {statistics['largest_id']}, its tokenizer knows "
                f"{known}; prepare the dataset anew",
            )
        )
    return found


def _data_differs(reference: Reference, data: Mapping[str, Any]) -> list[Finding]:
    theirs, found = reference.data, []
    if data["tokenizer_fingerprint"] != theirs["tokenizer_fingerprint"]:
        found.append(
            Finding(
                "tokenizer",
                f"the tokenizer is not that of {reference.preset}: {data['vocab_size']} tokens, "
                f"there {theirs['vocab_size']}; losses a token do not compare",
            )
        )
    for split, content in theirs["splits"].items():
        now = data["splits"][split]
        if now["sha256"] != content["sha256"]:
            found.append(
                Finding(
                    f"{split}_data",
                    f"the {split} split is not that of {reference.preset}: {now['tokens']:,} "
                    f"tokens, sha256 {now['sha256'][:12]}..., there {content['tokens']:,}, "
                    f"{content['sha256'][:12]}...; prepare it again",
                )
            )
    return found


# Settings that explain a curve off the band: how far they are from the recipe's, where 1 is a
# departure that shows, and how it is said.

_Number = int | float
_Distance = Callable[[_Number, _Number], float]


def _times(tolerance: _Number) -> _Distance:
    """A ratio of `tolerance` is 1."""

    def distance(ours: _Number, theirs: _Number) -> float:
        if ours == theirs:
            return 0.0
        if ours <= 0 or theirs <= 0:
            return 2.0
        return abs(math.log(ours / theirs)) / math.log(tolerance)

    return distance


def _apart(tolerance: _Number) -> _Distance:
    return lambda ours, theirs: abs(ours - theirs) / tolerance


_NUMBERS: Mapping[str, tuple[Callable[[TrainConfig], _Number], _Distance]] = {
    "learning_rate": (lambda c: c.learning_rate, _times(2)),
    "muon_learning_rate": (
        lambda c: c.muon_learning_rate if c.optimizer == "muon" else 0.0, _times(2)
    ),
    "tokens_per_step": (lambda c: c.global_batch_size * c.block_size, _times(1.5)),
    "weight_decay": (lambda c: c.weight_decay, _times(5)),
    "dropout": (lambda c: c.dropout, _apart(0.1)),
    "warmup_iters": (lambda c: c.warmup_iters if c.decay_lr else 0.0, _apart(100)),
    "lr_decay_iters": (lambda c: c.lr_decay_iters if c.decay_lr else math.inf, _times(1.5)),
    "min_lr": (lambda c: c.min_lr / c.learning_rate if c.learning_rate else 0.0, _apart(0.5)),
    "beta1": (lambda c: 1 - c.beta1, _times(3)),
    "beta2": (lambda c: 1 - c.beta2, _times(5)),
    "grad_clip": (lambda c: c.grad_clip or math.inf, _times(5)),
    "label_smoothing": (lambda c: c.label_smoothing, _apart(0.05)),
    "z_loss": (lambda c: c.z_loss, _apart(0.01)),
    "ema_decay": (lambda c: c.ema_decay, _apart(0.5)),
    "block_size": (lambda c: c.block_size, _times(1.5)),
    "n_layer": (lambda c: c.n_layer, _times(1.3)),
    "n_embd": (lambda c: c.n_embd, _times(1.3)),
    "n_head": (lambda c: c.n_head, _times(4)),
}  # fmt: skip


def _departures(config: TrainConfig, recipe: TrainConfig) -> list[tuple[float, Finding]]:
    """How far each setting is from the recipe's, the furthest first."""
    found: list[tuple[float, Finding]] = []
    for name, (value_of, distance) in _NUMBERS.items():
        ours, theirs = value_of(config), value_of(recipe)
        size = min(distance(ours, theirs), 20.0) if ours != theirs else 0.0
        if size > 0:
            found.append((size, Finding(name, _compared(name, ours, theirs))))
    known = {*_NUMBERS, "global_batch_size", "max_iters", "decay_lr"}
    ours_all, theirs_all = decisive(config), decisive(recipe)
    for name, ours in ours_all.items():
        if name not in known and ours != theirs_all[name]:
            text = f"{name} is {ours!r}, the recipe's {theirs_all[name]!r}"
            found.append((1.5, Finding(name, text)))
    if config.precision != recipe.precision:
        text = f"precision is {config.precision!r}, the recipe's {recipe.precision!r}"
        found.append((0.1, Finding("precision", text)))
    return sorted(found, key=lambda pair: -pair[0])


def _compared(name: str, ours: _Number, theirs: _Number) -> str:
    words = {"tokens_per_step": "tokens per step", "min_lr": "min_lr / learning_rate"}
    said = {"beta1": "1 - beta1", "beta2": "1 - beta2"} | words
    if ours > 0 and theirs > 0 and math.isfinite(ours) and math.isfinite(theirs):
        return (
            f"your {said.get(name, name)}, {ours:,g}, is {_ratio(ours / theirs)} the recipe's "
            f"{theirs:,g}"
        )
    return f"your {said.get(name, name)} is {ours:,g}, the recipe's {theirs:,g}"


def _ratio(ratio: float) -> str:
    if ratio >= 1:
        return f"{ratio:.3g} times"
    inverse = 1 / ratio
    parts = {2: "half", 3: "a third of", 4: "a quarter of"}
    if abs(inverse - round(inverse)) < 0.01:
        return parts.get(round(inverse), f"1/{round(inverse)} of")
    return f"{ratio:.2g} times"


def _causes(
    case: Case, steps: Sequence[Mapping[str, Any]], places: Sequence[Place]
) -> list[Finding]:
    """What explains losses above the band: what differs, or else what else was found."""
    assert case.reference is not None
    recipe = case.reference.config
    found = [finding for size, finding in _departures(case.config, recipe) if size >= 0.5]
    if (rate := _other_rate(case.reference, steps)) is not None:
        found.append(rate)
    above = {place.what for place in places if place.excess > 0}
    if not found and len(places) == 2 and above == {"validation loss"}:
        found.append(
            Finding("validation", "only the validation loss is above: the evaluation, or its data")
        )
    ratio = grad_norm_ratio(case.reference, steps)
    if ratio is not None:
        found.append(
            Finding("grad_norm", f"the gradient's norm is {ratio:.2g} times the reference's")
        )
    if found:
        return found
    made = case.reference.made_by
    return [
        Finding(
            "unexplained",
            "no setting and no data differs from the recipe's; what is left is the code, the "
            f"machine and its libraries (the reference: {made['devices']}, {made['precision']}, "
            f"jax {made['versions']['jax']}, commit {made['commit']})",
        )
    ]


def _other_rate(reference: Reference, steps: Sequence[Mapping[str, Any]]) -> Finding | None:
    """The learning rate that the last step really had, whatever the settings say."""
    if not steps or not steps[-1].get("lr"):
        return None
    ours, theirs = steps[-1]["lr"], reference.lr.at(steps[-1]["iter"])[0]
    if 0.5 < ours / theirs < 2:
        return None
    text = f"at step {steps[-1]['iter']:,} it is {ours:.1e}, the recipe's there {theirs:.1e}"
    return Finding("lr", text)


def _last_losses(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> str:
    found = []
    if steps and steps[-1].get("train_loss") is not None:
        found.append(f"train loss {steps[-1]['train_loss']:.3f}")
    if evaluations and evaluations[-1].get("val_loss") is not None:
        found.append(f"validation loss {evaluations[-1]['val_loss']:.3f}")
    return ", ".join(found) or "no finite loss"
