"""What is known to spoil runs, seen in their settings alone."""

import math

from train.config import TrainConfig
from train.finding import Finding

# Table 2.1 of the GPT-3 paper (arXiv:2005.14165): parameters, learning rate, tokens a step.
_GPT3 = (
    (125e6, 6.0e-4, 0.5e6), (350e6, 3.0e-4, 0.5e6), (760e6, 2.5e-4, 0.5e6), (1.3e9, 2.0e-4, 1e6),
    (2.7e9, 1.6e-4, 1e6), (6.7e9, 1.2e-4, 2e6),
)  # fmt: skip

_BY_HEART = 5
"""So many tokens a parameter are too many to learn by heart, however often they are read: nanoGPT's
GPT-2 reads OpenWebText, 73 a parameter, 33 times, and gains to the end."""


def traps(
    config: TrainConfig, recipe: TrainConfig, n_params: int, train_tokens: int | None
) -> list[Finding]:
    """What is likely wrong, each with the numbers and what to do.

    **Arguments:**

    - `recipe`: the preset that `config` was made from, by flags and files; itself if none was
      changed.
    - `train_tokens`: of the dataset; None if it is not known yet.
    """
    if config.eval_only:
        return []
    found = [*_against_recipe(config, recipe), *_schedule(config)]
    tokens = config.global_batch_size * config.block_size
    if config.init_from == "scratch":
        found += _against_gpt3(config, n_params, tokens)
    often = 100 if config.dropout else 8  # nanoGPT's shakespeare_char: 82 times, with dropout 0.2
    epochs = 0.0 if train_tokens is None else tokens * config.max_iters / train_tokens
    if train_tokens is not None and epochs > often and train_tokens < _BY_HEART * n_params:
        cure = "" if config.dropout else "; without dropout it will learn them by heart"
        found.append(
            Finding(
                "train_tokens",
                f"the run reads its {train_tokens:,} training tokens {epochs:,.0f} times{cure}: "
                "watch the validation loss, and keep the best with --always_save_checkpoint False",
            )
        )
    return found


def _against_recipe(config: TrainConfig, recipe: TrainConfig) -> list[Finding]:
    ours, theirs = (c.global_batch_size * c.block_size for c in (config, recipe))
    found = []
    ratio = ours / theirs
    if not 0.5 <= ratio <= 2:
        scaled = recipe.learning_rate * math.sqrt(ratio)
        effect = "its loss curve will be another"
        if config.learning_rate == recipe.learning_rate:
            effect = "its learning rate was meant for that"
        found.append(
            Finding(
                "tokens_per_step",
                f"a step has {ours:,} tokens, the recipe's {theirs:,}: {effect}. Keep batch_size * "
                f"gradient_accumulation_steps * block_size at {theirs:,} (smaller micro-batches "
                f"change only memory and speed), or begin with --learning_rate {scaled:.1e}, the "
                "square-root rule",
            )
        )
    elif (
        recipe.learning_rate
        and not 1 / 3 <= (factor := config.learning_rate / recipe.learning_rate) <= 3
    ):
        found.append(
            Finding(
                "learning_rate",
                f"learning_rate={config.learning_rate:g} is {factor:g} times the recipe's "
                f"{recipe.learning_rate:g} at the same batch",
            )
        )
    return found


def _schedule(config: TrainConfig) -> list[Finding]:
    found = []
    if config.decay_lr and not 0.8 <= config.lr_decay_iters / config.max_iters <= 1.25:
        effect = (
            "so the rate has not come down at the end"
            if config.lr_decay_iters > config.max_iters
            else "so the rest runs at min_lr"
        )
        found.append(
            Finding(
                "lr_decay_iters",
                f"lr_decay_iters={config.lr_decay_iters} is not max_iters={config.max_iters}, "
                f"{effect}; give --lr_decay_iters {config.max_iters}",
            )
        )
    if config.decay_lr and config.min_lr > config.learning_rate:
        found.append(
            Finding(
                "min_lr",
                f"min_lr={config.min_lr:g} is above learning_rate={config.learning_rate:g}: the "
                f"rate rises to the end; give --min_lr {config.learning_rate / 10:g}",
            )
        )
    if config.decay_lr and config.warmup_iters == 0 and config.init_from == "scratch":
        text = "there is no warm-up; give --warmup_iters, 1 % of the run or 100"
        found.append(Finding("warmup_iters", text))
    if config.weight_decay > 0.5:
        text = f"weight_decay={config.weight_decay:g} is far above the usual 0.1"
        found.append(Finding("weight_decay", text))
    if config.grad_clip == 0:
        text = "the gradient is not clipped: one bad batch may ruin the run; --grad_clip 1"
        found.append(Finding("grad_clip", text))
    if config.eval_interval > config.max_iters:
        found.append(
            Finding(
                "eval_interval",
                f"eval_interval={config.eval_interval} exceeds max_iters={config.max_iters}: the "
                "one evaluation is at the end",
            )
        )
    return found


def _against_gpt3(config: TrainConfig, n_params: int, tokens: int) -> list[Finding]:
    """A rate that is too high for a model of its size at its batch; of large ones, for small
    models bear much more."""
    if n_params < _GPT3[0][0] / 2:
        return []
    size, rate, batch = min(_GPT3, key=lambda row: abs(math.log(row[0] / n_params)))
    bearable = rate * min(1.0, math.sqrt(tokens / batch))
    if config.learning_rate <= 4 * bearable:
        return []
    return [
        Finding(
            "learning_rate",
            f"learning_rate={config.learning_rate:g} is {config.learning_rate / bearable:.0f} "
            f"times what GPT-3's {size / 1e6:,.0f}M model took, scaled to {tokens:,} tokens a step "
            f"by the square-root rule ({bearable:.1e})",
        )
    ]
