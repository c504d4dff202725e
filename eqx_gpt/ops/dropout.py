"""Dropout as a pure function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqx_gpt.shapes import PRNGKey


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKey | None) -> Float[Array, "*shape"]:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate).

    `key` None is evaluation mode: the input unchanged.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
