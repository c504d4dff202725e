"""Attention from new positions to all that a key-value cache holds."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eqx_gpt.ops.platform import stored
from eqx_gpt.ops.softcap import bent

_HIDDEN = -1e30  # finite: padding sees nothing, and must not become NaN


def cached_attention(
    q: Float[Array, "*batch seq head head_dim"],
    k: Float[Array, "batch_kv_head cache head_dim"],
    v: Float[Array, "batch_kv_head cache head_dim"],
    *,
    offset: Int[Array, ""],
    start: Int[Array, "*batch"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "*batch seq head head_dim"]:
    """As `eqx_gpt.ops.attention.causal_attention`, for queries at positions from `offset` on.

    `start` is the first position of each sequence that may be seen, None for 0. Products are in
    the dtype of the cache.
    """
    *batch, seq, head, head_dim = q.shape
    cache, kv_head = k.shape[1], len(k) // math.prod(batch)
    group = head // kv_head
    grouped = q.astype(k.dtype).reshape(-1, seq, kv_head, group, head_dim)
    grouped = jnp.moveaxis(grouped, 1, 3).reshape(len(k), group * seq, head_dim)
    scores = _batched_dot(grouped, k, contract=2).reshape(*batch, kv_head, group, seq, cache)
    scores = scores / math.sqrt(head_dim) if scale is None else scores * scale
    scores = bent(scores, softcap)

    position, key_position = offset + jnp.arange(seq)[:, None], jnp.arange(cache)[None, :]
    visible = key_position <= position
    if window is not None:
        visible = visible & (key_position > position - window)
    visible = jnp.broadcast_to(visible, scores.shape)
    if start is not None:
        first = jnp.broadcast_to(start[..., None, None, None, None], scores.shape)
        visible = visible & (jnp.broadcast_to(key_position, scores.shape) >= first)
    scores = jnp.where(visible, scores, _HIDDEN)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1).reshape(-1, head, seq)

    weights = weights.astype(v.dtype).reshape(len(k), group * seq, cache)
    mixed = _batched_dot(weights, v, contract=1).reshape(-1, head, seq, head_dim)
    mixed = jnp.swapaxes(mixed, 1, 2).reshape(*batch, seq, head * head_dim)
    total = jnp.repeat(jnp.swapaxes(total, 1, 2), head_dim, axis=-1).reshape(mixed.shape)
    # As one row, whose division XLA will not move back to where the heads are apart: the product
    # that follows reads one row many times as fast as it would read many heads.
    mixed = stored(mixed) / total
    return mixed.astype(q.dtype).reshape(q.shape)


def _batched_dot(x: Array, y: Array, *, contract: int) -> Float[Array, "batch_kv_head rows out"]:
    """The product, for each head, over the last axis of x and axis `contract` of y."""
    dimensions = (((2,), (contract,)), ((0,), (0,)))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
