"""Causal attention over whole sequences, by the best path that the platform has."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eqx_gpt.ops import blocked_attention, fused
from eqx_gpt.ops.dropout import kept_by, seeds_of
from eqx_gpt.ops.meshed import by_heads
from eqx_gpt.ops.platform import by_platform
from eqx_gpt.ops.softcap import bent
from eqx_gpt.shapes import PRNGKey


def causal_attention(
    q: Float[Array, "*batch seq head head_dim"],
    k: Float[Array, "*batch seq kv_head head_dim"],
    v: Float[Array, "*batch seq kv_head head_dim"],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    key: PRNGKey | None = None,
    starts: Int[Array, "*batch seq"] | None = None,
) -> Float[Array, "*batch seq head head_dim"]:
    """softmax(q k^T * scale) v (Vaswani et al. 2017, arXiv:1706.03762), causal.

    Query i sees the keys at positions up to its own, the last `window` of them. Query heads share
    key-value heads in consecutive groups (arXiv:2305.13245). `scale` None is 1 / sqrt(head_dim);
    `softcap` bends the scaled scores to softcap * tanh(scores / softcap). Scores and softmax are
    float32. `key` None means no dropout of the weights. Query i sees no key before `starts[i]`, at
    most i: where its document begins, of several in a sequence.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if key is not None and dropout_rate > 0:
        seeds = seeds_of(key, q.shape[:-1])
        return _attention(q, k, v, starts, seeds, window, scale, softcap, dropout_rate)
    platform = fused.platform()
    options = {"window": window, "softcap": softcap}
    asked = {"dtype": q.dtype, "head_dim": q.shape[-1], "seq": q.shape[-3], **options}
    if platform and not fused.refusal(platform, **asked, packed=starts is not None):
        attend = partial(_fused, platform, scale=scale, **options)
        return by_heads(attend, q, k, v, starts)
    return _attention(q, k, v, starts, None, window, scale, softcap, 0.0)


def _fused(
    platform: fused.Platform,
    q: Array,
    k: Array,
    v: Array,
    starts: Array | None,
    **options: Any,
) -> Array:
    return fused.attention(platform, q, k, v, starts=starts, **options)


def causal_scores(
    q: Float[Array, "*batch seq head head_dim"],
    k: Float[Array, "*batch seq kv_head head_dim"],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    starts: Int[Array, "*batch seq"] | None = None,
) -> Float[Array, "*batch head seq seq"]:
    """The scores of `causal_attention` for all pairs, float32; -inf for what a query cannot see."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = _grouped_scores(q, k, starts, window, scale, softcap)
    return scores.reshape(*q.shape[:-3], q.shape[-2], q.shape[-3], q.shape[-3])


def mix(
    weights: Float[Array, "*batch head seq seq"], v: Float[Array, "*batch seq kv_head head_dim"]
) -> Float[Array, "*batch seq head head_dim"]:
    """Each head's mean of the values by given weights, in the values' dtype."""
    *batch, head, seq, _ = weights.shape
    grouped = weights.reshape(*batch, v.shape[-2], head // v.shape[-2], seq, seq)
    mixed = jnp.einsum("...kgst,...tkd->...skgd", grouped.astype(v.dtype), v)
    return mixed.reshape(*batch, seq, head, v.shape[-1])


# Both platforms' paths keep the same few arrays for the backward pass. Differentiating through the
# choice instead would keep what either of them wants.
@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attention(
    q: Array,
    k: Array,
    v: Array,
    starts: Array | None,
    seeds: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    rate: float,
) -> Array:
    return _forward(q, k, v, starts, seeds, window, scale, softcap, rate)[0]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    starts: Array | None,
    seeds: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    rate: float,
) -> tuple[Array, tuple[Array | None, ...]]:
    how: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap, "rate": rate}

    def plain(q: Array, *rest: Any) -> tuple[Array, Array]:
        return _plain_attention(q, *rest, **how), jnp.zeros(q.shape[:-1], jnp.float32)

    def chosen(*arrays: Array | None) -> tuple[Array, Array]:
        return by_platform(*arrays, cpu=partial(blocked_attention.attend, **how), default=plain)

    out, lse = by_heads(chosen, q, k, v, starts, seeds)
    return out, (q, k, v, starts, seeds, out, lse)


def _backward(
    window: int | None,
    scale: float,
    softcap: float | None,
    rate: float,
    residuals: tuple[Any, ...],
    d: Array,
) -> tuple[Array, Array, Array, None, None]:
    how: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap, "rate": rate}

    def plain(q: Array, k: Array, v: Array, *rest: Any) -> tuple:
        starts, seeds, *_, d = rest

        def attend(q: Array, k: Array, v: Array) -> Array:
            return _plain_attention(q, k, v, starts, seeds, **how)

        return jax.vjp(attend, q, k, v)[1](d)

    def chosen(*arrays: Array | None) -> tuple:
        blocked = partial(blocked_attention.attend_backward, **how)
        return by_platform(*arrays, cpu=blocked, default=plain)

    return *by_heads(chosen, *residuals, d), None, None


_attention.defvjp(_forward, _backward)


def _plain_attention(
    q: Array,
    k: Array,
    v: Array,
    starts: Array | None,
    seeds: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    rate: float,
) -> Array:
    scores = _grouped_scores(q, k, starts, window, scale, softcap)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if seeds is not None:
        rows = jnp.moveaxis(seeds, -1, -2).reshape(weights.shape[:-1])
        rows = jnp.broadcast_to(rows[..., None], weights.shape)
        columns = jnp.broadcast_to(jnp.arange(weights.shape[-1]), weights.shape)
        weights = jnp.where(kept_by(rows, columns, rate), weights / (1 - rate), 0)
    mixed = jnp.einsum("...kgst,...tkd->...skgd", weights, v)
    return mixed.reshape(q.shape)


def _grouped_scores(
    q: Array,
    k: Array,
    starts: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "*batch kv_head group seq seq"]:
    *batch, seq, head, head_dim = q.shape
    kv_head = k.shape[-2]
    grouped = q.reshape(*batch, seq, kv_head, head // kv_head, head_dim)
    scores = jnp.einsum("...skgd,...tkd->...kgst", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * scale
    scores = bent(scores, softcap)
    distance = jnp.arange(seq)[:, None] - jnp.arange(seq)[None, :]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    visible = jnp.broadcast_to(visible, scores.shape)
    if starts is not None:
        first = jnp.broadcast_to(starts[..., None, None, :, None], scores.shape)
        visible = visible & (
            lax.broadcasted_iota(first.dtype, scores.shape, scores.ndim - 1) >= first
        )
    return jnp.where(visible, scores, -jnp.inf)
