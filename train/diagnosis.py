"""Is a run's curve normal? If not: what differs from the recipe, and which of that is proven.

Pure functions of what a run directory says: settings, data, and the lines of metrics.jsonl. With a
reference (see `reference.py`) the losses are held against its band, and what lies outside is
explained by what differs from the recipe, the largest departure first. The other checks need none.
Every check is a row of one of the tables below.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
_ORDER, _IN_ORDER, _ENOUGH = 0.02, 0.2, 5000
"""Nats that the token before tells: below the first next to nothing, above the second they lie in
order; and of how many tokens that can be said."""
_RECENT = 8
"""Lines of steps whose mean is judged where there is no reference."""
_RISE, _RISE_SIGMAS = 0.7, 8.0
"""By how many nats a loss rises that diverges, and standard deviations of the mean of its lines."""
_ROOM = 2.0
"""Below that loss of a new model, in nats, a sound run may well hardly fall: DNA has 1.39."""


@dataclass(frozen=True)
class Case:
    """What is known of a run besides its metrics.

    - `recipe`: the settings it is compared with: the reference's, the preset's, or None.
    - `reference`: only where the run's data is the reference's, for others have another curve.
    - `data`: alarms about the data; `notes`: what else is to be known of it.
    - `without`: why there is no reference.
    """

    config: TrainConfig
    vocab_size: int
    statistics: Mapping[str, float] | None
    recipe: TrainConfig | None
    reference: Reference | None
    data: tuple[Finding, ...]
    without: str
    eval_tokens: int
    notes: tuple[Finding, ...] = ()


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
        return [f"{self.label}: {self.text}", *(f"  {finding.line}" for finding in self.findings)]


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
    alarms, notes = (tuple(f for f in found if f.weight == weight) for weight in ("alarm", "note"))
    return Case(
        config, run["model"]["vocab_size"], run.get("statistics"), recipe, reference,
        alarms, without, eval_tokens, notes,
    )  # fmt: skip


def judge(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Verdict:
    """How the run stands after its newest line. `steps` need not hold more than the first line and
    the last hundred, `evaluations` than the best one and the last."""
    if not steps and not evaluations:
        return Verdict(0, "unknown", "no step has been logged yet")
    step = max(record["iter"] for record in [*steps[-1:], *evaluations[-1:]])
    seen = [found for check in _ALONE if (found := check(case, steps, evaluations)) is not None]
    alone, notes = ([f for f in seen if f.weight == weight] for weight in ("alarm", "note"))
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
        findings = tuple({f.name: f for f in reversed([*causes, *notes])}.values())[::-1]
        return Verdict(step, "off track", text, findings)
    if not places:
        standing: Standing = "nothing wrong" if len(steps) >= 4 else "unknown"
        if case.data:
            standing = "suspect"
        why = _not_placed(case, step)
        return Verdict(
            step, standing, f"{_last_losses(steps, evaluations)}; {why}", (*case.data, *notes)
        )
    below = [place for place in places if place.excess < 0]
    text = "; ".join(map(str, below or places)) + f" of {places[0].n_seed} seeds"
    if case.reference is not None:
        text = "; ".join([text, *_not_comparable(case.config, case.reference.config).values()])
    return Verdict(step, "better" if below else "on track", text, (*case.data, *notes))


def _places(
    case: Case,
    reference: Reference,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
) -> list[Place]:
    """Of the train loss, and of the last evaluation as long as it is not long ago; of what can be
    compared."""
    without = _not_comparable(case.config, reference.config)
    train = None if "train" in without else place_train(reference, steps)
    val = None
    if evaluations and "val" not in without:
        val = place_val(reference, evaluations[-1], case.eval_tokens)
        newest = steps[-1]["iter"] if steps else 0
        if val is not None and newest - val.step > max(reference.window, case.config.eval_interval):
            val = None
    return [place for place in (train, val) if place is not None]


def _not_comparable(config: TrainConfig, recipe: TrainConfig) -> dict[str, str]:
    """The losses that the settings make another quantity than the recipe's, and how to say it."""
    found = {}
    for name, split, what in (
        ("label_smoothing", "train", "the train loss is"),
        ("z_loss", "train", "the train loss is"),
        ("ema_decay", "val", "the validation loss is"),
    ):
        ours, theirs = getattr(config, name), getattr(recipe, name)
        if ours != theirs:
            found[split] = f"{what} not comparable, for {name} is {ours:g}, the recipe's {theirs:g}"
    return found


def _not_placed(case: Case, step: int) -> str:
    """Why no loss is held against a reference."""
    if case.reference is None:
        return case.without
    if step > case.reference.last:
        return f"the reference ends at step {case.reference.last:,}"
    reasons = _not_comparable(case.config, case.reference.config).values()
    return "; ".join([*reasons, "too few lines to compare yet"])


# What can be seen without a reference.


def _not_finite(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Finding | None:
    """Judged by the last lines alone: a run outlives what it skipped long ago."""
    if not steps:
        return None
    recent, before = steps[-_RECENT:], steps[-_RECENT - 1 : -_RECENT]
    broken = [r["iter"] for r in recent if r.get("train_loss") is None or
              r.get("grad_norm") is None]  # fmt: skip
    skipped = recent[-1].get("skipped", 0) - sum(r.get("skipped", 0) for r in before)
    n_step = recent[-1]["iter"] - (before[0]["iter"] if before else -1)
    if not broken and skipped < max(3, 0.01 * n_step):
        return None
    guilty = [
        f"{name}={value:g}"
        for name in ("z_loss", "learning_rate")
        if (value := getattr(case.config, name)) > 1
    ]
    why = f"; {' and '.join(guilty)} is far beyond what is usual" if guilty else (
        "; try --precision float32, a lower --learning_rate, --grad_clip 1"
    )  # fmt: skip
    counted = f"{skipped} of the last {n_step:,} steps were skipped"
    if not broken:
        if not guilty and (spikes := case.config.skip_spikes):
            why = (
                f": not finite, or a gradient beyond skip_spikes={spikes:g} times the usual; try a "
                "lower --learning_rate"
            )
        return Finding("skipped", f"{counted}{why}")
    return Finding(
        "overflow",
        f"the loss or its gradient is not finite at step {broken[-1]:,}, {counted}{why}",
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
    if math.log(case.vocab_size) < _ROOM:
        return None
    last = losses[-1][0]
    reach = max(50, last - losses[-_RECENT][0] + 1)
    recent = [loss for step, loss in losses if step > last - reach]
    before = [loss for step, loss in losses if last - 2 * reach < step <= last - reach]
    if case.config.init_from != "scratch" or len(before) < len(recent) // 2:
        return None
    mean, earlier = sum(recent) / len(recent), sum(before) / max(len(before), 1)
    first, statistics, falls = losses[0], case.statistics, 0.1
    if statistics is not None:
        entropy = statistics["entropy"]
        if abs(mean - entropy) < 0.04 and abs(mean - earlier) < 0.04:
            return _no_context(statistics, mean)
        # Of tokens that are all about as frequent, that is all the way down to their entropy.
        falls = min(0.1, max(first[1] - entropy, 0.0) / 2)
    if first[0] == 0 and min(mean, earlier) > first[1] - falls:
        return Finding(
            "not_falling", f"the loss is {mean:.2f} after {last:,} steps, {first[1]:.2f} at first"
        )
    return None


def _no_context(statistics: Mapping[str, float], mean: float) -> Finding:
    """Of a loss that stays at the entropy: a note where that may be all there is to learn."""
    orders = [statistics["train_order"], statistics["val_order"]]
    why = "the learning rate may be too low, or far too high"
    if orders[0] < _ORDER:
        why = f"shuffling its tokens would change nothing ({max(orders[0], 0):.3f} nats)"
        if orders[1] < _ORDER:
            why += ": their order is lost, or tells little, as in proteins"
    return Finding(
        "token_order" if orders[0] < _ORDER else "no_context",
        f"the loss stays at {mean:.2f}, the entropy of the tokens' frequencies "
        f"({statistics['entropy']:.2f}): nothing is learnt from the tokens before; {why}",
        "note" if max(orders) < _ORDER else "alarm",
    )


def _diverged(
    case: Case, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Finding | None:
    """By more than the noise of the lines, told from how they differ from one to the next, lets
    the mean of some be above the lowest of many."""
    recent = [r["train_loss"] for r in steps[-_RECENT:] if r.get("train_loss") is not None]
    before = [r["train_loss"] for r in steps[:-_RECENT] if r.get("train_loss") is not None]
    if len(recent) < _RECENT or len(before) < _RECENT:
        return None
    best = min(
        sum(before[i : i + _RECENT]) / _RECENT for i in range(len(before) - _RECENT + 1)
    )  # fmt: skip
    mean = sum(recent) / len(recent)
    if mean < best + _RISE:
        return None
    squares = [(b - a) ** 2 for a, b in pairwise(before)]
    noise = math.sqrt(sum(squares) / len(squares) / 2)
    if mean < best + _RISE_SIGMAS * noise / math.sqrt(_RECENT):
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
    text = (
        f"validation loss {val:.2f}, {train:.2f} on what it trains on: it learns its training "
        "text by heart, or the validation split is of another kind"
    )
    if case.config.always_save_checkpoint:
        return Finding("memorised", text)
    best = min(
        (e for e in evaluations if e.get("val_loss") is not None), key=lambda e: e["val_loss"]
    )
    return Finding(
        "memorised",
        f"{text}; the best evaluation, {best['val_loss']:.3f} at step {best['iter']:,}, is kept",
        "note",
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
    order = {split: statistics[f"{split}_order"] for split in ("train", "val")}
    low, high = sorted(order, key=lambda split: order[split])
    shortest = min(run["data"]["splits"][split]["tokens"] for split in order)
    if shortest < max(_ENOUGH, statistics["n_seen"]) or order[low] >= _ORDER:
        pass  # of a few tokens hardly a pair is there twice
    elif order[high] > _IN_ORDER:
        found.append(
            Finding(
                "token_order",
                f"the {low} split's order is lost: a token tells {max(order[low], 0):.3f} nats of "
                f"the next, as in a shuffled text, in the {high} split {order[high]:.3f}; prepare "
                "the dataset anew",
            )
        )
    elif order[high] < _ORDER and statistics["entropy"] > 0.1:
        found.append(
            Finding(
                "token_order",
                f"a token tells little of the next, {max(order['train'], 0):.3f} nats: so it is in "
                "proteins and DNA, and in a shuffled text",
                "note",
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
    n_token = run["data"]["vocab_size"]
    if statistics["largest_id"] >= n_token:
        found.append(
            Finding(
                "tokenizer",
                f"the training split has the token {statistics['largest_id']}, its tokenizer knows "
                f"{n_token}; prepare the dataset anew",
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
    # Averaged weights are never compared.
    known = {*_NUMBERS, "global_batch_size", "max_iters", "decay_lr", "ema_decay"}
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
    """The learning rate that the last step really had, whatever the settings say. What is below a
    hundredth of the highest is as good as 0, where many schedules end."""
    if not steps or not steps[-1].get("lr"):
        return None
    ours, theirs = steps[-1]["lr"], reference.lr.at(steps[-1]["iter"])[0]
    least = max(reference.lr.mean) / 100
    if max(theirs, least) < 2 * max(ours, least) < 4 * max(theirs, least):
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
