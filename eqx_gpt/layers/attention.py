"""Self-attention: one fused projection to queries, keys and values, and one back."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.layers.linear import Linear
from eqx_gpt.layers.norm import Norm
from eqx_gpt.layers.rope import rotate
from eqx_gpt.ops.attention import causal_attention, causal_scores, mix
from eqx_gpt.ops.bits import split
from eqx_gpt.ops.cached_attention import cached_attention
from eqx_gpt.shapes import Hidden, PRNGKey
from eqx_gpt.tap import NO_TAP, Tap


def positions_in(starts: Int[Array, "*batch seq"] | None, seq: int) -> Int[Array, "*batch seq"]:
    """Of each token in its document, which begins at `starts`; None is one from 0."""
    if starts is None:
        return jnp.arange(seq)
    return jnp.broadcast_to(jnp.arange(seq, dtype=starts.dtype), starts.shape) - starts


class Attention(eqx.Module):
    """Causal multi-head attention; grouped when there are fewer key-value heads.

    The rows of `qkv` are all queries, then all keys, then all values, each head by head.
    """

    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    config: GPTConfig = eqx.field(static=True)

    @staticmethod
    def init(config: GPTConfig, *, std: float, out_std: float, key: PRNGKey) -> "Attention":
        key_qkv, key_out = jax.random.split(key)
        parts, head_dim = config.attention, config.head_dim
        n_q, n_kv = config.n_head, config.n_kv_head
        q_norm, k_norm = None, None
        if parts.qk_norm != "none":
            heads = (1, 1) if parts.qk_norm == "head" else (n_q, n_kv)
            q_norm, k_norm = (Norm.init(config.norm, n * head_dim) for n in heads)
        n_qkv = (n_q + 2 * n_kv) * head_dim
        return Attention(
            Linear.init(config.n_embd, n_qkv, bias=parts.qkv_bias, std=std, key=key_qkv),
            q_norm,
            k_norm,
            Linear.init(
                n_q * head_dim, config.n_embd, bias=parts.out_bias, std=out_std, key=key_out
            ),
            config,
        )

    def __call__(
        self,
        x: Hidden,
        *,
        kind: int = 0,
        cache: KVCache | None = None,
        layer: int = 0,
        key: PRNGKey | None = None,
        starts: Int[Array, "*batch seq"] | None = None,
        tap: Tap = NO_TAP,
    ) -> tuple[Hidden, KVCache | None]:
        """Attend within `x`, or from `x` to all that `layer` of the cache holds and to `x`.

        `kind` is the layer's index in `config.layers`. `starts`, without a cache, is where the
        document of each position begins: none sees another.
        """
        config, parts = self.config, self.config.attention
        *batch, seq, _ = x.shape
        q, k, v = self._project(x)
        position = config.layer_position(kind)
        if position.kind == "rope":
            positions = positions_in(starts, seq) if cache is None else cache.positions(seq)
            q, k = rotate(q, positions, position), rotate(k, positions, position)
        q, k, v = tap("attention.q", q), tap("attention.k", k), tap("attention.v", v)
        window, scale, softcap = config.layers[kind].window, parts.scale, parts.softcap
        if cache is not None:
            cache = cache.append(layer, k, v)
        if cache is None or (cache.empty and cache.start is None):
            mixed = causal_attention(
                q,
                k,
                v,
                window=window,
                scale=scale,
                softcap=softcap,
                dropout_rate=config.weights_dropout,
                key=key,
                starts=starts,
            )
            if tap.of_pairs:
                scores = partial(
                    causal_scores, window=window, scale=scale, softcap=softcap, starts=starts
                )
                mixed = _tapped(tap, scores, q, k, v, mixed)
        else:
            mixed = cached_attention(
                q,
                cache.k[layer],
                cache.v[layer],
                offset=cache.length,
                start=cache.start,
                window=window,
                scale=scale,
                softcap=softcap,
            )
        mixed = tap("attention.heads", mixed)
        return self.out(mixed.reshape(*batch, seq, -1)), cache

    def _project(
        self, x: Hidden
    ) -> tuple[
        Float[Array, "*batch seq head head_dim"],
        Float[Array, "*batch seq kv_head head_dim"],
        Float[Array, "*batch seq kv_head head_dim"],
    ]:
        """Queries, keys and values, normalised but not yet rotated."""
        config, parts = self.config, self.config.attention
        n_q, n_kv = config.n_head, config.n_kv_head
        qkv = self.qkv(x)
        if parts.clip_qkv is not None:
            qkv = jnp.clip(qkv, -parts.clip_qkv, parts.clip_qkv)
        heads = qkv.reshape(*x.shape[:-1], n_q + 2 * n_kv, config.head_dim)
        q, k, v = split(heads, (n_q, n_kv, n_kv), -2)
        if self.q_norm is None or self.k_norm is None:
            return q, k, v
        if parts.qk_norm == "head":
            return self.q_norm(q), self.k_norm(k), v
        together = (*x.shape[:-1], -1)
        normed_q, normed_k = self.q_norm(q.reshape(together)), self.k_norm(k.reshape(together))
        return normed_q.reshape(q.shape), normed_k.reshape(k.shape), v


def _tapped(
    tap: Tap, scores: Callable[..., Array], q: Array, k: Array, v: Array, mixed: Array
) -> Float[Array, "*batch seq head head_dim"]:
    """`mixed`, but for the heads whose scores or weights the tap changes."""

    def look(q: Array, k: Array, v: Array, mixed: Array) -> tuple[Array, dict[str, Array]]:
        here = Tap(tap.of_pairs, tap.layer, tap.n_layer)
        plain = scores(q, k)
        weights = jax.nn.softmax(here("attention.scores", plain), axis=-1)
        weights = here("attention.weights", weights)
        if all(request.edit is None for request in here.requests):
            return mixed, here.seen
        changed = jnp.any(weights != jax.nn.softmax(plain, axis=-1), axis=(-2, -1))
        changed = jnp.broadcast_to(changed[..., None, :, None], mixed.shape)
        return _choose(changed, mix(weights, v), mixed), here.seen

    def pass_by(q: Array, k: Array, v: Array, mixed: Array) -> tuple[Array, dict[str, Array]]:
        _, unseen = jax.eval_shape(look, q, k, v, mixed)
        return mixed, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), unseen)

    mixed, seen = tap.where_asked(tap.of_pairs, look, pass_by, q, k, v, mixed)
    tap.seen.update(seen)
    return mixed


@jax.custom_jvp
def _choose(changed: Array, new: Array, old: Array) -> Array:
    """`new` where it is another number, but everywhere a function of what `new` depends on: an edit
    by a factor of 1 has a gradient too."""
    return jnp.where(changed, new, old)


@_choose.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return _choose(*primals), tangents[1]
