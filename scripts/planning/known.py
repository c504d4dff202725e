"""What is known of a run's data and model beforehand, and the batch chosen for them."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from train.config import TrainConfig
from train.run import has_run, read_run

if TYPE_CHECKING:
    from eqx_gpt import GPTConfig

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


def with_chosen_batch(config: TrainConfig, *, alone: bool = True) -> TrainConfig:
    """With the largest batch that fits on this machine, of the same global batch. A CPU takes no
    more than it had, and that in the micro-batches of any run.

    ValueError if this process is not `alone`: its devices must not be touched before all have met.
    """
    if not alone:
        raise ValueError(
            "--batch_size auto is for a run of one process, and this one is of several; give a "
            "number: scripts/plan.py says what fits"
        )
    from train.plan import choose_layout, planned_model

    n_token, _, pretrained = size_of(config)
    model_cfg = planned_model(config, n_token, pretrained)
    say = partial(print, file=sys.stderr)
    layout, execution, *_ = choose_layout(config, model_cfg, auto=True, say=say)
    rows = max(execution.micro_batch_size, min(layout.batch_size, config.batch_size))
    remat = layout.remat
    steps = config.global_batch_size // rows
    more = "" if remat == config.remat else f", with remat={remat}"
    say(f"batch_size auto: {rows}, {steps} times a step, {rows * steps} as before{more}")
    return dataclasses.replace(
        config, batch_size=rows, gradient_accumulation_steps=steps, remat=remat
    )
