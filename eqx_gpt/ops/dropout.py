"""Dropout as a pure function.

The bits of jax.random take longer on a CPU than all else that is done with a number. So jax.random
draws a seed for each row, and the numbers of a row are told apart by a hash: made anew wherever
they are wanted, in any order, so that no mask is ever kept.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from eqx_gpt.ops.meshed import here_of_parts
from eqx_gpt.shapes import PRNGKey


@partial(jax.checkpoint, static_argnums=(1,))
def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKey | None) -> Float[Array, "*shape"]:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate).

    `key` None is evaluation mode: the input unchanged.
    """
    if key is None or rate == 0:
        return x
    rows = x if x.ndim else x[None]
    columns = jnp.broadcast_to(jnp.arange(rows.shape[-1]), rows.shape)
    seeds = jnp.broadcast_to(seeds_of(key, rows.shape[:-1])[..., None], rows.shape)
    kept = jnp.where(kept_by(seeds, columns, rate), rows / (1 - rate), jnp.zeros_like(rows))
    return kept.reshape(x.shape)


def seeds_of(key: PRNGKey, shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """One for each row of what is to be dropped; a part of a batch gets those of its rows."""
    part, n_part = here_of_parts()
    if n_part == 1:
        return jax.random.bits(key, shape, jnp.uint32)
    seeds = jax.random.bits(key, (n_part * shape[0], *shape[1:]), jnp.uint32)
    return lax.dynamic_slice_in_dim(seeds, part * shape[0], shape[0])


def kept_by(
    seeds: UInt32[Array, "*shape"], columns: Int[Array, "*shape"], rate: float
) -> Bool[Array, "*shape"]:
    """True with probability 1 - `rate`, independently in each column of each row.

    The hash is "lowbias32" (Wellons 2018, https://nullprogram.com/blog/2018/07/31/) of a
    Weyl sequence that begins at the seed.
    """
    x = seeds + columns.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    return x >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
