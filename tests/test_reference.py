"""Is a curve normal? Synthetic curves of known noise, spoiled data, and a run that is told."""

import dataclasses
import io
import json
import math
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import FLAGS, make_dataset

from eqx_gpt.record import FORMAT_VERSION as FORMAT
from scripts.benchmarks.reference import of_evaluations, of_steps, text_of
from train.config import TrainConfig
from train.diagnosis import Case, case_of, judge
from train.loop import train as run_training
from train.manifest import Manifest
from train.presets import PRESETS
from train.reference import (
    FORMAT_VERSION,
    Reference,
    band,
    decisive,
    load_reference,
    parse_reference,
    place_train,
    place_val,
    reference_of,
    steps_to,
)
from train.report import report_html
from train.run import read_run
from train.token_statistics import token_statistics
from train.watch import Watch

RECIPE = TrainConfig(
    dataset="made_up", batch_size=13, gradient_accumulation_steps=1, block_size=59,
    learning_rate=1e-3, max_iters=1000, lr_decay_iters=1000, warmup_iters=50, min_lr=1e-4,
    eval_interval=100, eval_iters=7, log_interval=10, dropout=0.0,
)  # fmt: skip
NOISE, SEEDS = 0.06, 0.01
RUN = {"made_by": {"devices": "cpu", "precision": "float32", "versions": {"jax": "1"},
                   "commit": "abc"}}  # fmt: skip


def curve(step: Any) -> Any:
    return 2.0 + 2.2 * np.exp(-np.asarray(step, np.float64) / 180)


def made_run(seed: int, n_step: int, every: int, shift: float = 0.0) -> list[dict[str, Any]]:
    """Lines of steps as a run has them: its own curve, and noise of each batch."""
    rng = np.random.default_rng(seed)
    own = shift + SEEDS * rng.standard_normal()
    iters = np.arange(0, n_step, every)
    losses = curve(iters) + own + NOISE * rng.standard_normal(len(iters))
    norms = np.exp(0.1 * rng.standard_normal(len(iters)))
    lr = np.interp(iters, [0, 50, 1000], [2e-5, 1e-3, 1e-4])
    return [
        {"iter": int(i), "train_loss": float(x), "grad_norm": float(g), "lr": float(r),
         "skipped": 0}
        for i, x, g, r in zip(iters, losses, norms, lr, strict=True)
    ]  # fmt: skip


def made_evaluations(seed: int, shift: float = 0.0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    own = shift + SEEDS * rng.standard_normal()
    return [{"iter": i, "val_loss": float(curve(i)) + 0.1 + own} for i in range(100, 1001, 100)]


@pytest.fixture(scope="module")
def reference() -> Reference:
    runs = [made_run(seed, 1000, 1) for seed in range(5)]
    data = {"name": "made_up", "vocab_size": 67, "tokenizer_fingerprint": "f", "splits": {}}
    content = {
        "format_version": FORMAT_VERSION,
        "preset": "made-up",
        "config": dataclasses.asdict(RECIPE),
        "data": data,
        **RUN,
        "n_seed": 5,
        "window": 50,
        "eval_tokens": 5369,
        "token_deviation": 1.7,
        "train_loss": of_steps(runs, "train_loss"),
        "val_loss": of_evaluations([made_evaluations(seed) for seed in range(5)]),
        "grad_norm": of_steps(runs, "grad_norm", np.log),
        "lr": of_steps(runs[:1], "lr"),
    }
    return parse_reference(json.loads(text_of(content)))


def case(reference: Reference | None, **changes: Any) -> Case:
    config = dataclasses.replace(RECIPE, **changes)
    statistics = {"entropy": 3.3, "train_order": 0.8, "val_order": 0.8, "divergence": 0.01,
                  "usual_divergence": 0.01, "largest_id": 66, "n_seen": 67}  # fmt: skip
    return Case(config, 67, statistics, RECIPE, reference, (), "none", 5369)


def test_what_a_reference_knows(reference: Reference) -> None:
    """The mean, the spread between seeds and the noise that went in come out."""
    for step in (100, 333, 900):
        mean, seeds, noise = reference.train_loss.at(step)
        assert mean == pytest.approx(float(curve(step)), abs=0.03)
        assert 0.3 * SEEDS < seeds < 4 * SEEDS
        assert noise == pytest.approx(NOISE, rel=0.25)
    assert reference.last == 999
    edges = band(reference, 5369)
    assert [step for step, _, _ in edges] == list(range(100, 1001, 100))
    assert all(low < float(curve(step)) + 0.1 < high for step, low, high in edges)
    assert steps_to(reference, float(curve(500)) + 0.13) == 500
    assert steps_to(reference, 1.0) is None
    # Fewer tokens evaluated say less.
    wide, narrow = (place_val(reference, {"iter": 500, "val_loss": 2.0}, n) for n in (900, 5369))
    assert wide is not None
    assert narrow is not None
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_sound_curves_raise_no_alarm(reference: Reference) -> None:
    for seed in range(100, 130):
        for every in (1, 10, 37):
            steps, evaluations = made_run(seed, 1000, every), made_evaluations(seed)
            for n in range(4, len(steps), max(1, len(steps) // 12)):
                seen = [e for e in evaluations if e["iter"] <= steps[n]["iter"]]
                verdict = judge(case(reference), steps[: n + 1], seen)
                assert verdict.standing in ("on track", "better"), (seed, every, verdict)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"learning_rate": 1e-2}, ("learning_rate",)),
        ({"batch_size": 3, "dropout": 0.05}, ("tokens_per_step", "dropout")),
        ({"weight_decay": 10.0}, ("weight_decay",)),
        ({"dropout": 0.5}, ("dropout",)),
        ({"optimizer": "lion"}, ("optimizer",)),
        ({"lr_decay_iters": 100}, ("lr_decay_iters",)),
        ({"beta1": 0.0, "warmup_iters": 0}, ("beta1", "warmup_iters")),
        ({}, ("unexplained",)),
    ],
)
def test_a_curve_above_the_band_has_its_reason(
    reference: Reference, change: dict[str, Any], names: tuple[str, ...]
) -> None:
    steps = made_run(7, 400, 10, shift=0.3)
    verdict = judge(case(reference, **change), steps, [])
    assert verdict.standing == "off track"
    assert tuple(f.name for f in verdict.findings) == names
    assert ", 0.1" in verdict.text  # of 0.3 above the mean, what is above the band


def test_the_sentence_has_the_numbers(reference: Reference) -> None:
    fewer = case(reference, batch_size=13, block_size=59, gradient_accumulation_steps=1)
    quarter = dataclasses.replace(
        fewer, config=dataclasses.replace(RECIPE, batch_size=13, block_size=59, max_iters=1000),
        reference=dataclasses.replace(
            reference, config=dataclasses.replace(RECIPE, gradient_accumulation_steps=4)
        ),
    )  # fmt: skip
    verdict = judge(quarter, made_run(7, 400, 10, shift=0.3), made_evaluations(7, 0.4)[:3])
    said = "\n".join(verdict.lines())
    assert said.startswith("OFF TRACK: train loss (mean of 5 lines) 2.")
    assert "your tokens per step, 767, is a quarter of the recipe's 3,068" in said
    assert "above the band" in said
    assert "validation loss" in said


def test_below_the_band_is_better_and_said(reference: Reference) -> None:
    verdict = judge(case(reference), made_run(7, 400, 10, shift=-0.3), [])
    assert verdict.standing == "better"
    assert "below the band" in verdict.text


def test_only_as_far_as_the_reference_reaches(reference: Reference) -> None:
    longer = [{**line, "iter": line["iter"] + 2000} for line in made_run(7, 400, 10, shift=1.0)]
    assert place_train(reference, longer) is None
    assert place_val(reference, {"iter": 2000, "val_loss": 9.0}, 5369) is None
    assert place_val(reference, {"iter": 50, "val_loss": 9.0}, 5369) is None


def lines(losses: list[float | None], **more: Any) -> list[dict[str, Any]]:
    return [
        {"iter": 10 * i, "train_loss": loss, "grad_norm": 1.0, "lr": 1e-3, "skipped": 0, **more}
        for i, loss in enumerate(losses)
    ]


FALLING = [4.2 - 0.05 * i for i in range(20)]


@pytest.mark.parametrize(
    ("losses", "more", "evaluations", "name"),
    [
        ([math.log(67) + 2.0, *FALLING], {}, [], "initial_loss"),
        ([1.0, *FALLING[10:]], {}, [], "initial_loss"),
        ([4.2, *([3.31] * 20)], {}, [], "no_context"),
        ([4.2] * 30, {}, [], "not_falling"),
        ([4.2] * 20, {"lr": 0.0}, [], "learning_rate"),
        ([*FALLING, *([4.4] * 9)], {}, [], "diverged"),
        ([*FALLING, None], {}, [], "overflow"),
        (FALLING, {}, [{"iter": 190, "val_loss": 3.9, "eval_train_loss": 1.2}], "memorised"),
    ],
)
def test_what_needs_no_reference(
    losses: list[float | None], more: dict[str, Any], evaluations: list[dict[str, Any]], name: str
) -> None:
    verdict = judge(case(None), lines(losses, **more), evaluations)
    assert verdict.standing == "off track"
    assert [f.name for f in verdict.findings] == [name]


def test_nothing_wrong_without_a_reference() -> None:
    verdict = judge(case(None), lines(list(FALLING)), [{"iter": 190, "val_loss": 3.3}])
    assert (verdict.standing, verdict.findings) == ("nothing wrong", ())
    assert judge(case(None), [], []).standing == "unknown"


@pytest.mark.parametrize(
    ("every", "n", "alarm"), [(10, 2, False), (10, 5, True), (100, 5, False), (100, 9, True)]
)
def test_skipped_steps_count_while_they_are_new(every: int, n: int, alarm: bool) -> None:
    """Three, and a hundredth of the steps; a run goes on soundly after them."""
    steps = lines([4.2 - 0.01 * i for i in range(60)])
    for i, line in enumerate(steps):
        line["iter"] = every * i
        line["skipped"] = min(max(i - 19, 0), n)
    assert judge(case(None), steps[:20], []).standing == "nothing wrong"
    new = [judge(case(None), steps[: i + 1], []) for i in range(20, 30)]
    assert ("off track" in [verdict.standing for verdict in new]) == alarm
    for verdict in new:
        assert "not finite" not in str(verdict)
        assert {f.name for f in verdict.findings} <= {"skipped"}
    assert judge(case(None), steps, []).standing == "nothing wrong"


@pytest.mark.parametrize("deviation", [0.5, 1.0])
def test_noise_is_not_divergence(deviation: float) -> None:
    rng = np.random.default_rng(3)
    for noise in deviation * rng.standard_normal((5, 150)):
        steps = lines([4.9, *(4.0 + noise).tolist()])
        looks = [judge(case(None), steps[:n], []).findings for n in range(17, 150, 4)]
        assert "diverged" not in {f.name for found in looks for f in found}
    quiet = deviation * rng.standard_normal(150)
    risen = lines([4.9, *(4.0 + quiet).tolist(), *([4.0 + 4 * deviation] * 8)])
    assert [f.name for f in judge(case(None), risen, []).findings] == ["diverged"]


def test_few_kinds_of_tokens_leave_little_to_learn() -> None:
    few = dataclasses.replace(case(None), vocab_size=4, statistics=None)
    falling = lines([1.39 - 0.06 * i / 40 for i in range(40)])
    assert judge(few, falling, []).standing == "nothing wrong"
    near = {**(case(None).statistics or {}), "entropy": 1.37}
    assert judge(dataclasses.replace(few, statistics=near), falling, []).findings == ()
    # 32 kinds, nearly as frequent: down to their entropy is all the way of a fall.
    even = {**near, "entropy": math.log(32) - 0.06}
    down = lines([math.log(32), *([math.log(32) - 0.05 - 0.0021 * i for i in range(30)])])
    some = dataclasses.replace(few, vocab_size=32, statistics=even)
    assert "not_falling" not in [f.name for f in judge(some, down[:22], []).findings]


def test_what_is_learnt_by_heart_may_be_by_design(tmp_path: Path) -> None:
    """nanoGPT's shakespeare_char ends so, with the best evaluation kept."""
    evaluations = [
        {"iter": 1500, "val_loss": 1.469, "eval_train_loss": 1.1},
        {"iter": 5000, "val_loss": 1.69, "eval_train_loss": 0.62},
    ]
    verdict = judge(case(None, always_save_checkpoint=False), lines(list(FALLING)), evaluations)
    assert verdict.standing == "nothing wrong"
    (found,) = verdict.findings
    assert (found.name, found.weight) == ("memorised", "note")
    assert "1.469 at step 1,500, is kept" in found.text
    assert verdict.lines()[1].startswith("  NOTE (memorised)")
    assert judge(case(None), lines(list(FALLING)), evaluations).standing == "off track"


def test_a_watch_keeps_the_best_evaluation(data: Manifest, tmp_path: Path) -> None:
    run = run_of(data, tmp_path)
    run["format_version"] = FORMAT
    run["config"]["always_save_checkpoint"] = False
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    watch = Watch(tmp_path, 1000)
    for line in lines(list(FALLING)):
        watch.after(line)
    for step, loss in ((200, 1.9), (300, 1.5), (400, None), (500, 1.8), (600, 1.9)):
        told = watch.after({"iter": step, "val_loss": loss, "eval_train_loss": 0.6})
    assert "1.500 at step 300, is kept" in told[-1]


@pytest.mark.parametrize(
    ("change", "split", "said"),
    [
        ({"label_smoothing": 0.1}, "train", "label_smoothing is 0.1, the recipe's 0"),
        ({"z_loss": 1e-4}, "train", "z_loss is 0.0001, the recipe's 0"),
        ({"ema_decay": 0.99}, "val", "ema_decay is 0.99, the recipe's 0"),
    ],
)
def test_another_kind_of_loss_is_not_compared(
    reference: Reference, change: dict[str, Any], split: str, said: str
) -> None:
    steps = made_run(7, 400, 10, shift=0.4 if split == "train" else 0.0)
    evaluations = made_evaluations(7, 0.4 if split == "val" else 0.0)[:3]
    verdict = judge(case(reference, **change), steps, evaluations)
    assert verdict.standing == "on track"
    what = "train" if split == "train" else "validation"
    assert f"the {what} loss is not comparable, for {said}" in verdict.text
    if split == "train":
        verdict = judge(case(reference, **change), steps, [])
        assert (verdict.standing, verdict.findings) == ("nothing wrong", ())
        assert f"not comparable, for {said}" in verdict.text
    # The other loss is compared as ever.
    off = [line | {"train_loss": line["train_loss"] + 0.4} for line in made_run(7, 400, 10)]
    wrong = (steps, made_evaluations(7, 0.4)[:3]) if split == "train" else (off, evaluations)
    assert judge(case(reference, **change), *wrong).standing == "off track"


def test_past_the_end_of_the_reference_it_says_so(reference: Reference) -> None:
    longer = [{**line, "iter": line["iter"] + 2000} for line in made_run(7, 400, 10)]
    verdict = judge(case(reference), longer, [])
    assert verdict.text.endswith("; the reference ends at step 999")
    early = judge(case(reference), longer[:0] + made_run(7, 20, 10), [])
    assert early.text.endswith("; too few lines to compare yet")


def test_a_reference_whose_rate_ends_at_zero(reference: Reference) -> None:
    rate = dataclasses.replace(
        reference.lr, mean=tuple(1e-3 * (1 - i / 999) for i in reference.lr.iter)
    )
    ended = dataclasses.replace(reference, lr=rate)
    steps = made_run(7, 1000, 3, shift=0.3)
    for line in steps:
        line["lr"] = 1e-3 * (1 - line["iter"] / 1000)  # at the last one 1e-6, for 0
    found = judge(case(ended), steps, []).findings
    assert [f.name for f in found] == ["unexplained"]
    steps[-1]["lr"] = 1e-4
    assert [f.name for f in judge(case(ended), steps, []).findings] == ["lr"]


def test_a_gradient_that_grows() -> None:
    steps = lines([4.2 - 0.01 * i for i in range(40)])
    for i, line in enumerate(steps):
        line["grad_norm"] = 0.5 * 1.2**i
    assert [f.name for f in judge(case(None), steps, []).findings] == ["grad_norm"]


# The data.


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    return Manifest.read(make_dataset(tmp_path / "data") / "tiny")


def test_statistics_against_their_formulas(data: Manifest) -> None:
    tokens = np.array(data.tokens("train"), np.int64)
    found = token_statistics(tokens, np.array(data.tokens("val")))
    shares = np.bincount(tokens) / len(tokens)
    expected = -sum(p * math.log(p) for p in shares if p)
    assert found.entropy == pytest.approx(expected)
    assert found.largest_id == tokens.max()
    assert found.n_seen == np.count_nonzero(shares)
    assert found.train_order > 0.5
    assert found.divergence < 0.5


def run_of(data: Manifest, out_dir: Path, **spoilt: np.ndarray) -> dict[str, Any]:
    """What run.json would say of a dataset with other tokens."""
    tokens = {s: spoilt.get(s, np.array(data.tokens(s))) for s in ("train", "val")}
    described = data.to_dict()
    for split, content in described["splits"].items():
        content["tokens"] = len(tokens[split])
    return {
        "config": dataclasses.asdict(TrainConfig(**FLAGS, out_dir=str(out_dir))),
        "model": {"vocab_size": data.vocab_size}, "data": described, "preset": None,
        "statistics": token_statistics(tokens["train"], tokens["val"]).to_dict(),
    }  # fmt: skip


def test_spoilt_data_is_named(data: Manifest, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, val = (np.tile(np.array(data.tokens(split)), 31) for split in ("train", "val"))
    others = rng.permutation(data.vocab_size).astype(val.dtype)
    sound = case_of(run_of(data, tmp_path, train=train, val=val))
    assert (sound.data, sound.notes) == ((), ())
    cases = (
        ({"train": rng.permutation(train)}, "token_order"),
        ({"val": rng.permutation(val)}, "token_order"),
        ({"val": others[val]}, "val_data"),
        ({"train": np.append(train, data.vocab_size).astype(train.dtype)}, "tokenizer"),
    )
    for spoilt, name in cases:
        spoilt_case = case_of(run_of(data, tmp_path, **{"train": train, "val": val} | spoilt))
        assert [finding.name for finding in spoilt_case.data] == [name]
        assert judge(spoilt_case, lines(list(FALLING)), []).standing == "suspect"


def in_order(rng: np.random.Generator, n: int, n_token: int, share: float) -> np.ndarray:
    """Tokens of which each is, so often, the one before plus 1, and else any."""
    found = rng.integers(n_token, size=n)
    for i in np.flatnonzero(rng.random(n) < share)[1:]:
        found[i] = (found[i - 1] + 1) % n_token
    return found.astype(np.uint16)


def test_little_order_is_no_fault_and_said(data: Manifest, tmp_path: Path) -> None:
    """As of proteins and DNA, and of a few tokens; shuffled text looks the same, and so is told."""
    rng = np.random.default_rng(5)
    train, val = in_order(rng, 30011, 23, 0.03), in_order(rng, 7001, 23, 0.03)
    found = case_of(run_of(data, tmp_path, train=train, val=val))
    assert found.data == ()
    assert [f"{note.line:.43}" for note in found.notes] == [
        "NOTE (token_order) a token tells little of "
    ]
    clear = in_order(rng, 30011, 23, 0.8)
    few = case_of(run_of(data, tmp_path, train=clear, val=rng.permutation(clear)[:1999]))
    assert (few.data, few.notes) == ((), ())
    weak = case_of(run_of(data, tmp_path, train=in_order(rng, 30011, 23, 0.15), val=val))
    assert (weak.data, weak.notes) == ((), ())
    # A loss that stays at the entropy of the frequencies is then all there may be to learn.
    stuck = lines([3.3, *([math.log(23)] * 20)])
    verdict = judge(dataclasses.replace(found, vocab_size=23), stuck, [])
    assert verdict.standing == "nothing wrong"
    assert [(f.name, f.weight) for f in verdict.findings] == [("token_order", "note")]
    assert "order is lost, or tells little" in verdict.findings[0].text


# The references that there are.


@pytest.mark.parametrize("preset", [p for p in PRESETS if load_reference(p) is not None])
def test_references_are_of_the_presets_as_they_are(preset: str) -> None:
    """Else they have to be made anew: scripts/benchmarks/reference.py."""
    reference = load_reference(preset)
    assert reference is not None
    assert decisive(reference.config) == decisive(PRESETS[preset])
    assert reference.last == PRESETS[preset].max_iters - 1
    assert reference.n_seed == len(reference.made_by["seeds"]) >= 3
    assert reference_of(None, PRESETS[preset]) is not None
    by_xla = dataclasses.replace(PRESETS[preset], products="xla", precision="float32")
    assert reference_of(None, by_xla) is not None
    found = reference_of(None, dataclasses.replace(PRESETS[preset], learning_rate=0.123))
    assert found is None
    for curve in (reference.train_loss, reference.val_loss, reference.grad_norm, reference.lr):
        assert len(curve.iter) == len(curve.mean) == len(curve.seeds) == len(curve.noise)


def test_presets_without_one() -> None:
    assert load_reference("gpt2-small") is None
    assert reference_of("gpt2-small", PRESETS["gpt2-small"]) is None


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format_version 7, expected 1"):
        parse_reference({"format_version": 7})


# A run.


def test_a_run_is_told_and_reported(tmp_path: Path, quick_compilation: None) -> None:
    data = Manifest.read(make_dataset(tmp_path / "data") / "tiny")
    flags = {**FLAGS, "max_iters": 12, "lr_decay_iters": 12, "eval_interval": 6, "warmup_iters": 0}
    config = TrainConfig(**flags, out_dir=str(tmp_path / "run"))
    said = io.StringIO()
    with redirect_stderr(said):
        run_training(config, data, preset="gpt2-small")
    text = said.getvalue()
    assert "WATCH OUT (warmup_iters) there is no warm-up" in text
    assert "WATCH OUT (tokens_per_step) a step has 39 tokens, the recipe's 491,520" in text
    assert text.count("WATCH OUT (warmup_iters)") == 1
    assert "this run's recipe has no reference curve" in text.splitlines()[-1]
    run = read_run(tmp_path / "run")
    assert run["preset"] == "gpt2-small"
    expected = token_statistics(data.tokens("train"), data.tokens("val"))
    assert run["statistics"] == expected.to_dict()
    again = Watch(tmp_path / "run", 1000)
    assert again.verdict().step == 12
    from train.history import read_history

    page = report_html([read_history(tmp_path / "run")])
    assert "Is it normal?" in page
    assert again.verdict().label in page
