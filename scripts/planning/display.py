"""A plan as a person reads it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import rich.console
import rich.table

from train.config import TrainConfig
from train.finding import Finding
from train.progress import duration
from train.reference import reference_of, steps_to

if TYPE_CHECKING:
    from train.plan import Plan


def print_plan(plan: "Plan", config: TrainConfig, traps: Sequence[Finding]) -> None:
    """To stdout."""
    console = rich.console.Console(highlight=False)
    table = rich.table.Table(show_header=False, box=None, pad_edge=False)
    count = f"{plan.n_device} x " if plan.n_device > 1 else ""
    table.add_row("device", f"{count}{plan.device} ({plan.basis})")
    table.add_row("model", f"{plan.n_params:,} parameters")
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    table.add_row(
        "batch",
        f"{config.global_batch_size} x {config.block_size} tokens a step: {plan.n_micro} "
        f"micro-batches of {plan.micro_batch_size}"
        + (f", mesh {mesh}" if mesh else "")
        + (f", remat {plan.remat}" if plan.remat != "none" else ""),
    )
    for what, size in plan.memory.items():
        table.add_row("", f"{_size(size):>10}  {what}")
    room = "" if plan.room is None else f" of {_size(plan.room)}"
    fits = "" if plan.fits else ": DOES NOT FIT"
    table.add_row("memory", f"{_size(plan.total_memory):>10}{room} on each device{fits}")
    mfu = "" if plan.mfu is None else f", MFU {plan.mfu:.0%}"
    table.add_row("step", f"{plan.step_s:.3g} s, {plan.tokens_per_s:,.0f} tokens/s{mfu}")
    dollars = "" if plan.dollars is None else f", ${plan.dollars:,.0f}"
    table.add_row("run", f"{config.max_iters:,} steps: {duration(plan.run_s)}{dollars}")
    if (steps := _steps_to_target(config)) is not None:
        share = steps / config.max_iters
        dollars = "" if plan.dollars is None else f", ${plan.dollars * share:,.0f}"
        table.add_row(
            "target",
            f"loss {config.target_val_loss:g} after about {steps:,} steps, as in the reference's "
            f"runs: {duration(plan.run_s * share)}{dollars}",
        )
    console.print(table)
    for line in plan.assumptions:
        console.print(f"- {line}", soft_wrap=True)
    for trap in traps:
        console.print(f"WATCH OUT {trap}", soft_wrap=True)
    if not plan.fits:
        console.print(
            "Even one sequence at a time does not fit; take more devices, a shorter --block_size, "
            "or a smaller model",
            soft_wrap=True,
        )


def _steps_to_target(config: TrainConfig) -> int | None:
    if config.target_val_loss is None:
        return None
    reference = reference_of(None, replace(config, target_val_loss=None))
    return None if reference is None else steps_to(reference, config.target_val_loss)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"
