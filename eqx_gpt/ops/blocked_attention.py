"""Causal attention for CPUs, and its gradients: block by block.

Forward, a block of queries meets only the keys that some query of it may see; backward, a block of
keys meets only the queries that may see it, in transposed form (keys x queries), so that every
product is canonical (see matmul.py) and nothing of size queries x keys is transposed. Kept for the
backward pass are the inputs, the output and the logarithm of each query's sum: the memory is
linear in the length (Dao et al. 2022, arXiv:2205.14135; Rabe & Staats 2021, arXiv:2112.05682).

Below, n counts sequences times key-value heads, g the query heads that share one of them, and sg
positions times those.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped, UInt32

from eqx_gpt.ops.bits import as_bits, concatenated, from_bits
from eqx_gpt.ops.dropout import kept_by
from eqx_gpt.ops.exp import exp_of_negative
from eqx_gpt.ops.matmul import product, product_transposed, row_major
from eqx_gpt.ops.platform import apart
from eqx_gpt.ops.rounding import rounded
from eqx_gpt.ops.softcap import bend_slope, bent

_MASKED = -1e30  # finite, so that the distance to a maximum is never inf - inf
_SCORES = 2**19  # as many at a time as stay in the caches of a core or two: 2 MiB of float32


def attend(
    q: Float[Array, "*batch seq head head_dim"],
    k: Float[Array, "*batch seq kv_head head_dim"],
    v: Float[Array, "*batch seq kv_head head_dim"],
    starts: Int[Array, "*batch seq"] | None,
    seeds: UInt32[Array, "*batch seq head"] | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    rate: float,
) -> tuple[Float[Array, "*batch seq head head_dim"], Float[Array, "*batch seq head"]]:
    """As `eqx_gpt.ops.attention.causal_attention`; also log(sum(exp(scores))) of each query."""
    group = q.shape[-2] // k.shape[-2]
    run = partial(_attend, group=group, window=window, scale=scale, softcap=softcap, rate=rate)
    operands = (
        _queries(q, group),
        _keys_transposed(k),
        _keys(v),
        _starts(starts, k.shape[-2]),
        None if seeds is None else _of_queries(seeds, group),
    )
    out, lse = _few_at_a_time(run, operands, _block_size(q.shape[-3]))
    lse = _unqueries(lse[..., None], (*q.shape[:-1], 1), group)[..., 0]
    # Kept for both what follows and the gradients, in this one order.
    return lax.optimization_barrier(_unqueries(out, q.shape, group)), lse


def attend_backward(
    q: Float[Array, "*batch seq head head_dim"],
    k: Float[Array, "*batch seq kv_head head_dim"],
    v: Float[Array, "*batch seq kv_head head_dim"],
    starts: Int[Array, "*batch seq"] | None,
    seeds: UInt32[Array, "*batch seq head"] | None,
    out: Float[Array, "*batch seq head head_dim"],
    lse: Float[Array, "*batch seq head"],
    d: Float[Array, "*batch seq head head_dim"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    rate: float,
) -> tuple[Array, Array, Array]:
    """The gradients of queries, keys and values; `d` is that of the output."""
    group = q.shape[-2] // k.shape[-2]
    # What the softmax takes off the gradient of each weight: sum(weights * d_weights).
    delta = _sums_by_head(d.astype(jnp.float32) * out.astype(jnp.float32))
    operands = (
        _queries(q, group),
        _keys(k),
        _keys_transposed(k),
        _keys(v),
        _queries(d, group),
        _of_queries(lse, group),
        _of_queries(delta, group),
        _starts(starts, k.shape[-2]),
        None if seeds is None else _of_queries(seeds, group),
    )
    run = partial(
        _attend_backward, group=group, window=window, scale=scale, softcap=softcap, rate=rate
    )
    dq_t, dk, dv = _few_at_a_time(run, operands, _block_size(q.shape[-3]))
    dq = _unqueries(jnp.swapaxes(dq_t, 1, 2), q.shape, group)
    return dq, _unqueries(dk, k.shape, 1), _unqueries(dv, k.shape, 1)


def _attend(
    q: Float[Array, "sg d"],
    k_t: Float[Array, "d s"],
    v: Float[Array, "s d"],
    starts: Int[Array, " s"] | None,
    seeds: UInt32[Array, " sg"] | None,
    *,
    group: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    rate: float,
) -> tuple[Float[Array, "sg d"], Float[Array, " sg"]]:
    """The output, and log(sum(exp(scores))) of each query."""
    outs, sums = [], []
    for i, end in _blocks(len(v)):
        first = 0 if window is None else max(0, i - window + 1)
        block, keys = slice(i * group, end * group), np.arange(first, end)[None, :]
        scores, factor = product(q[block], k_t[:, first:end]), scale
        if softcap is not None:
            scores, factor = bent(scores * scale, softcap), 1.0
        position = np.repeat(np.arange(i, end), group)[:, None]
        seen = _visible(position, keys, window, scores.shape)
        if starts is not None:
            start = jnp.repeat(starts[i:end], group)[:, None]
            seen = seen & _from(start, keys, scores.shape)
        # Keys before the block are seen by all of it, and their scores left as they are.
        some = i - first if window is None and starts is None else 0
        masked = jnp.where(seen[:, some:], scores[:, some:], _MASKED)
        scores = _written(scores, masked, some)
        top = lax.optimization_barrier(jnp.max(scores, axis=-1, keepdims=True))
        distance = factor * (scores - jnp.broadcast_to(top, scores.shape))
        powers = exp_of_negative(distance, q.dtype)
        weights = lax.optimization_barrier(rounded(jnp.where(seen, powers, 0), q.dtype))
        total = jnp.sum(weights.astype(jnp.float32), axis=-1, keepdims=True)
        if seeds is not None:
            rows = jnp.broadcast_to(seeds[block, None], weights.shape)
            weights = _dropped(weights, rows, keys, rate)
        mixed = product(weights, v[first:end])
        mixed = rounded(mixed / jnp.broadcast_to((1 - rate) * total, mixed.shape), q.dtype)
        outs.append(mixed)
        sums.append((factor * top + jnp.log(total))[..., 0])
    return concatenated(tuple(outs), 0), jnp.concatenate(sums)


def _attend_backward(
    q: Float[Array, "sg d"],
    k: Float[Array, "s d"],
    k_t: Float[Array, "d s"],
    v: Float[Array, "s d"],
    d: Float[Array, "sg d"],
    lse: Float[Array, " sg"],
    delta: Float[Array, " sg"],
    starts: Int[Array, " s"] | None,
    seeds: UInt32[Array, " sg"] | None,
    *,
    group: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    rate: float,
) -> tuple[Float[Array, "d sg"], Float[Array, "s d"], Float[Array, "s d"]]:
    """The gradients of queries, keys and values; `d` is that of the output."""
    seq, dtype = len(k), q.dtype
    dqs, dks, dvs = [], [], []
    later = None  # the gradients of queries from this block on, of the keys before it
    for j, end in _blocks(seq):
        last = seq if window is None else min(seq, end + window - 1)
        seeing, keys = slice(j * group, last * group), np.arange(j, end)[:, None]
        rows, d_rows = q[seeing], d[seeing]
        scores = product_transposed(k[j:end], rows)

        def of_query(x: Array, seeing: slice = seeing, shape: tuple = scores.shape) -> Array:
            return jnp.broadcast_to(x[None, seeing], shape)

        position = np.repeat(np.arange(j, last), group)[None, :]
        seen = _visible(position, keys, window, scores.shape)
        if starts is not None:
            start = jnp.repeat(starts[j:last], group)[None, :]
            seen = seen & _from(start, keys, scores.shape)
        d_weights = product_transposed(v[j:end], d_rows)
        kept = rounded(_weights(bent(scores * scale, softcap), of_query(lse), seen, dtype), dtype)
        # One loop makes both from the scores: see `apart`.
        scores = bent(apart(scores) * scale, softcap)
        if seeds is not None:
            kept = _dropped(kept, of_query(seeds), keys, rate)
            d_weights = _dropped(d_weights, of_query(seeds), keys, rate) / (1 - rate)
        slope = scale if softcap is None else scale * bend_slope(scores, softcap)
        weights = _weights(scores, of_query(lse), seen, dtype)
        d_scores = rounded(weights * (d_weights - of_query(delta)) * slope, dtype)
        kept, d_scores = lax.optimization_barrier((kept, d_scores))
        dvs.append(rounded(product(kept, d_rows) / (1 - rate), dtype))
        dks.append(rounded(product(d_scores, rows), dtype))
        d_seeing = product(k_t[:, j:end], d_scores)
        if later is not None:
            unseen = d_seeing.shape[1] - later.shape[1]
            d_seeing = jnp.pad(later, ((0, 0), (0, unseen))) + d_seeing
        own = (end - j) * group
        dqs.append(rounded(d_seeing[:, :own], dtype))
        later = d_seeing[:, own:] if own < d_seeing.shape[1] else None
    dq_t = concatenated(tuple(dqs), 1)
    return dq_t, concatenated(tuple(dks), 0), concatenated(tuple(dvs), 0)


def _written(x: Array, columns: Array, first: int) -> Array:
    """`x` with `columns` in place of its own from the `first` on.

    Where these are all of them, `x.at` would scatter by an index of no numbers, an empty array, at
    which jaxlib 0.11 crashes where devices compute by themselves (`by_part`).
    """
    return lax.dynamic_update_slice_in_dim(x, columns, first, axis=1)


def _weights(scores: Array, lse: Array, seen: Array, dtype: jnp.dtype) -> Array:
    return jnp.where(seen, exp_of_negative(jnp.minimum(scores - lse, 0), dtype), 0)


def _dropped(x: Array, seeds: Array, columns: np.ndarray, rate: float) -> Array:
    """Zero where the weight of a key, one of `columns`, is dropped."""
    kept = kept_by(seeds, jnp.broadcast_to(jnp.asarray(columns), x.shape), rate)
    return jnp.where(kept, x, jnp.zeros_like(x))


def _visible(
    position: np.ndarray, key_position: np.ndarray, window: int | None, shape: tuple[int, ...]
) -> Array:
    # Compared in the program: as a constant it would be as large as the scores.
    distance = jnp.asarray(position, jnp.int32) - jnp.asarray(key_position, jnp.int32)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return jnp.broadcast_to(seen, shape)


def _from(start: Array, key_position: np.ndarray, shape: tuple[int, ...]) -> Array:
    """Which keys lie in the document of their query, which begins at `start`."""
    keys = jnp.asarray(key_position, start.dtype)
    return jnp.broadcast_to(keys, shape) >= jnp.broadcast_to(start, shape)


def _starts(starts: Int[Array, "*batch s"] | None, kv_head: int) -> Int[Array, "n s"] | None:
    if starts is None:
        return None
    seq = starts.shape[-1]
    rows = starts.reshape(-1, 1, seq)
    return jnp.broadcast_to(rows, (rows.shape[0], kv_head, seq)).reshape(-1, seq)


def _block_size(seq: int) -> int:
    """The larger, the better the products; the smaller, the less is computed of the half that is
    masked."""
    return 256 if seq > 512 else 128


def _blocks(seq: int) -> list[tuple[int, int]]:
    size = _block_size(seq)
    return [(i, min(i + size, seq)) for i in range(0, seq, size)]


def _few_at_a_time(run: Callable, operands: tuple[Array | None, ...], block: int) -> tuple:
    """`run` over the leading axis, in as large parts as leave the scores of a block in the
    caches."""
    assert operands[0] is not None  # the queries
    n, n_query, _ = operands[0].shape
    scores_of_one = block * n_query
    few = max(d for d in range(1, n + 1) if n % d == 0 and (d == 1 or d * scores_of_one <= _SCORES))
    if n == few:
        return jax.vmap(run)(*operands)
    shape = (n,) if few == 1 else (n // few, few)
    run = run if few == 1 else jax.vmap(run)
    parts = jax.tree.map(lambda x: as_bits(x).reshape(*shape, *x.shape[1:]), operands)
    dtypes = []

    def run_part(part: tuple[Array | None, ...]) -> tuple:
        part = jax.tree.map(lambda x, like: from_bits(x, like.dtype), part, operands)
        results = run(*part)
        dtypes[:] = [x.dtype for x in results]
        return jax.tree.map(as_bits, results)

    results = lax.map(run_part, parts)
    return tuple(
        from_bits(x, dtype).reshape(n, *x.shape[len(shape) :])
        for x, dtype in zip(results, dtypes, strict=True)
    )


def _queries(x: Shaped[Array, "*batch s h d"], group: int) -> Shaped[Array, "n sg d"]:
    """Heads of a group side by side at each position, so that neighbouring positions are
    neighbouring rows."""
    seq, head, head_dim = x.shape[-3:]
    heads = jnp.swapaxes(x.reshape(-1, seq, head // group, group * head_dim), 1, 2)
    return row_major(heads.reshape(-1, seq * group, head_dim))


def _of_queries(x: Shaped[Array, "*batch s h"], group: int) -> Shaped[Array, "n sg"]:
    return _queries(x[..., None], group)[..., 0]


def _unqueries(x: Shaped[Array, "n sg d"], shape: tuple[int, ...], group: int) -> Array:
    """What `_queries` was made from."""
    seq, head, head_dim = shape[-3:]
    heads = x.reshape(-1, head // group, seq, group * head_dim)
    return jnp.swapaxes(heads, 1, 2).reshape(shape)


def _sums_by_head(x: Float[Array, "*batch s h d"]) -> Float[Array, "*batch s h"]:
    """As a product with ones and zeros: a sum over so few numbers is slow."""
    *batch, head, head_dim = x.shape
    ones = jnp.repeat(jnp.eye(head, dtype=jnp.float32), head_dim, axis=0)
    rows = lax.optimization_barrier(x.reshape(-1, head * head_dim))
    return lax.optimization_barrier(product(rows, ones)).reshape(*batch, head)


def _keys(x: Float[Array, "*batch s k d"]) -> Float[Array, "n s d"]:
    return _queries(x, 1)


def _keys_transposed(x: Float[Array, "*batch s k d"]) -> Float[Array, "n d s"]:
    seq, _, head_dim = x.shape[-3:]
    return row_major(jnp.moveaxis(x.reshape(-1, seq, x.shape[-2], head_dim), 1, 3)).reshape(
        -1, head_dim, seq
    )
