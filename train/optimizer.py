"""What learns and how: frozen parts, AdamW with clipping and nanoGPT's schedule, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from eqx_gpt import lora
from eqx_gpt.shapes import Scalar
from eqx_gpt.tree import map_with_roles, matching, name_of, named_arrays
from train.config import TrainConfig


def trainable(config: TrainConfig, model: PyTree) -> PyTree:
    """True for the leaves of the model that learn, False for the frozen ones.

    ValueError if a pattern of `config.freeze` fits nothing, or if they leave nothing to learn.
    """
    if config.lora_rank:
        return lora.trainable(model)
    names = list(named_arrays(model))
    try:
        frozen = set(matching(names, config.freeze)) if config.freeze else set()
    except ValueError as error:
        raise ValueError(f"freeze: {error}") from None
    if len(frozen) == len(names):
        raise ValueError(f"freeze={config.freeze!r} fits every array; leave something to learn")
    return jax.tree_util.tree_map_with_path(lambda path, _: name_of(path) not in frozen, model)


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Step (from 0) -> learning rate: linear warm-up, cosine decay to `min_lr`, then constant."""
    if not config.decay_lr:
        return optax.constant_schedule(config.learning_rate)
    # The first step already has 1 / (warmup_iters + 1) of the rate: at 0 it would be lost.
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_iters + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_iters,
        decay_steps=config.lr_decay_iters,
        end_value=config.min_lr,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv:1711.05101); all decays but biases and norms."""

    def decays(model: PyTree) -> PyTree:
        return map_with_roles(lambda role, _: role in ("weight", "lora", "embedding"), model)

    adamw = optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    clip = optax.identity() if config.grad_clip == 0 else clip_by_norm(config.grad_clip)
    optimizer = optax.chain(clip, adamw)

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        # optax multiplies floats by its int32 count of steps.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, but that who knows the global norm may give it as `norm`."""

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        norm: Scalar | None = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.OptState]:
        size = optax.tree.norm(updates) if norm is None else norm
        small = size < limit
        return jax.tree.map(lambda u: jnp.where(small, u, (u / size) * limit), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
