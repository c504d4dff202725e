"""The learning rate as a function of the step: warm-up, then the shape that a config names."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from train.config import Schedule, TrainConfig

# Of a share of the decay done, from 0 to 1: what is left of the way from the highest learning
# rate to the lowest.
_SHAPES: dict[Schedule, Callable[[Array], Array]] = {
    "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
    "linear": lambda done: 1 - done,
    "wsd": lambda done: 1 - done,
    "constant": jnp.ones_like,
}


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Step (from 0) -> learning rate: linear warm-up, the decay of `config.lr_schedule` until
    `lr_decay_iters`, then `min_lr`.

    `cosine` is nanoGPT's (arXiv:1608.03983 without restarts). `wsd`, warm-up-stable-decay, is
    constant until the last `wsd_decay` of `lr_decay_iters`, and then linear (arXiv:2404.06395).
    `constant` warms up and stays.
    """
    high, warmup = config.learning_rate, config.warmup_iters
    if not config.decay_lr:
        return optax.constant_schedule(high)
    low = high if config.lr_schedule == "constant" else config.min_lr
    begin, end = warmup, config.lr_decay_iters
    if config.lr_schedule == "wsd":
        begin = max(warmup, round(end * (1 - config.wsd_decay)))

    def schedule(count: ArrayLike) -> Array:
        step = jnp.asarray(count, jnp.float32)
        # The first step already has 1 / (warmup + 1) of the rate: at 0 it would be lost.
        warming = high * (step + 1) / (warmup + 1)
        done = jnp.clip((step - begin) / max(end - begin, 1), 0, 1)
        decaying = low + (high - low) * _SHAPES[config.lr_schedule](done)
        return jnp.where(step < warmup, warming, decaying)

    return schedule
