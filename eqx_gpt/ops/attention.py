"""Causal attention, for whole sequences and for queries that continue a cache."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eqx_gpt.ops.dropout import dropout
from eqx_gpt.shapes import PRNGKey


def causal_attention(
    q: Float[Array, "*batch seq head head_dim"],
    k: Float[Array, "*batch cache kv_head head_dim"],
    v: Float[Array, "*batch cache kv_head head_dim"],
    *,
    offset: int | Int[Array, ""] = 0,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    key: PRNGKey | None = None,
) -> Float[Array, "*batch seq head head_dim"]:
    """softmax(q k^T * scale) v (Vaswani et al. 2017, arXiv:1706.03762), causal.

    Query i stands at position `offset + i` and sees the keys at positions up to its own, the last
    `window` of them. Query heads share key-value heads in consecutive groups (arXiv:2305.13245).
    `scale` None is 1 / sqrt(head_dim); `softcap` bends the scaled scores to
    softcap * tanh(scores / softcap). Scores and softmax are float32. `key` None means no dropout.
    """
    *batch, seq, head, head_dim = q.shape
    cache, kv_head = k.shape[-3:-1]
    grouped = q.reshape(*batch, seq, kv_head, head // kv_head, head_dim)
    scores = jnp.einsum("...skgd,...tkd->...kgst", grouped, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(head_dim) if scale is None else scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = offset + jnp.arange(seq)[:, None] - jnp.arange(cache)[None, :]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores = jnp.where(jnp.broadcast_to(visible, scores.shape), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = dropout(weights, dropout_rate, key)
    mixed = jnp.einsum("...kgst,...tkd->...skgd", weights, v)
    return mixed.reshape(q.shape)
