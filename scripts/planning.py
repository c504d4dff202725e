"""A plan as a person reads it, and what is known of a run's data and model beforehand."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import rich.console
import rich.table

from train.config import TrainConfig
from train.progress import duration
from train.run import has_run, read_run

if TYPE_CHECKING:
    from eqx_gpt import GPTConfig
    from train.plan import Plan

_N_TOKEN = {"shakespeare_char": 65}
_GPT2_TOKENS = 50257


def size_of(config: TrainConfig) -> "tuple[int, int | None, GPTConfig | None]":
    """The tokenizer's tokens, those to train on if the dataset is prepared, and the model that the
    run starts from, if it does not start from scratch."""
    from eqx_gpt import GPTConfig, get_config
    from eqx_gpt.zoo import list_models

    meta = Path(config.data_dir) / config.dataset / "meta.json"
    n_token, train_tokens = _N_TOKEN.get(config.dataset, _GPT2_TOKENS), None
    if meta.is_file():
        content = json.loads(meta.read_text(encoding="utf-8"))
        n_token, train_tokens = content["vocab_size"], content["splits"]["train"]["tokens"]
    if config.init_from == "scratch":
        return n_token, train_tokens, None
    if config.init_from in list_models():
        return n_token, train_tokens, get_config(config.init_from)
    if has_run(config.init_from):
        model = GPTConfig.from_dict(read_run(config.init_from)["model"])
        return n_token, train_tokens, model
    from weights import from_pretrained

    return n_token, train_tokens, from_pretrained(config.init_from).config


def with_chosen_batch(config: TrainConfig) -> TrainConfig:
    """With the largest micro-batches that fit on this machine, of the same global batch."""
    from train.plan import choose_layout, planned_model

    n_token, _, pretrained = size_of(config)
    model_cfg = planned_model(config, n_token, pretrained)
    say = partial(print, file=sys.stderr)
    rows = choose_layout(config, model_cfg, auto=True, say=say)[0].micro_batch_size
    steps = config.global_batch_size // rows
    say(f"batch_size auto: {rows}, in {steps} micro-batches a step, {rows * steps} as before")
    return dataclasses.replace(config, batch_size=rows, gradient_accumulation_steps=steps)


def print_plan(plan: "Plan", config: TrainConfig, traps: list[str]) -> None:
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
        f"micro-batches of {plan.micro_batch_size}" + (f", mesh {mesh}" if mesh else ""),
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
    console.print(table)
    for line in plan.assumptions:
        console.print(f"- {line}", soft_wrap=True)
    for trap in traps:
        console.print(f"WATCH OUT: {trap}", soft_wrap=True)
    if not plan.fits:
        console.print(
            "Even one sequence at a time does not fit; take more devices, a shorter --block_size, "
            "or a smaller model",
            soft_wrap=True,
        )


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"
