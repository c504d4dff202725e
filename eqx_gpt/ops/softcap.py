"""Soft caps of scores and logits, as in Gemma 2 (arXiv:2408.00118, section 2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def bent(x: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    """softcap * tanh(x / softcap), or without a cap `x`."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def bend_slope(y: Float[Array, "*shape"], softcap: float) -> Float[Array, "*shape"]:
    """The slope of `bent`, where it gave `y`."""
    return 1 - jnp.square(y / softcap)
