"""The account of a run: where its time went, and how much work was done in it."""

from collections.abc import Mapping

from train.clock import PHASES, TRAINING, Phase
from train.progress import duration

MEANING: Mapping[Phase, str] = {
    "start": "until the first step, compiling included",
    "data": "waiting for the next batch",
    "step": "computing",
    "log": "metrics and loggers",
    "evaluation": "evaluations",
    "checkpoint": "waiting for checkpoints",
    "other": "samples, pictures, reports",
}


def account(seconds: Mapping[Phase, float], tokens: int, flops: float) -> dict[str, int | float]:
    """What every line of metrics.jsonl says of the run until then: `elapsed_s` and its parts,
    `start_s`, `data_s` and so on; the tokens trained on, and what they took in FLOPs."""
    parts = {f"{phase}_s": round(value, 6) for phase, value in seconds.items()}
    elapsed = round(sum(seconds.values()), 6)
    return {"tokens": tokens, "flops": flops, "elapsed_s": elapsed, **parts}


def summary(
    seconds: Mapping[Phase, float], tokens: int, flops: float, peak: float | None
) -> list[str]:
    """Lines for the end of a run, of all its processes.

    The rate is of `tokens` over the phases of training, `peak` is that of all devices.
    """
    total = sum(seconds.values())
    lines = [f"time {duration(total)}"]
    for phase in PHASES:
        share = seconds[phase] / total if total else 0.0
        lines.append(f"  {phase:<10} {seconds[phase]:>12,.1f} s {share:>6.1%}  {MEANING[phase]}")
    training = sum(seconds[phase] for phase in TRAINING)
    if not tokens or not training:
        return lines
    work = f"work {tokens:,} tokens, {flops:.3g} FLOPs, {tokens / training:,.0f} tok/s"
    lines.append(work if peak is None else f"{work}, mfu {flops / training / peak:.1%}")
    return lines
