"""Self-attention: one fused projection to queries, keys and values, and one back."""

import equinox as eqx
import jax
import jax.numpy as jnp

from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.layers.linear import Linear
from eqx_gpt.layers.rope import rotate
from eqx_gpt.ops.attention import causal_attention
from eqx_gpt.shapes import Hidden, PRNGKey


class Attention(eqx.Module):
    """Causal multi-head attention; grouped when there are fewer key-value heads.

    The rows of `qkv` are all queries, then all keys, then all values, each head by head.
    """

    qkv: Linear
    out: Linear
    config: GPTConfig = eqx.field(static=True)

    @staticmethod
    def init(config: GPTConfig, *, std: float, out_std: float, key: PRNGKey) -> "Attention":
        key_qkv, key_out = jax.random.split(key)
        width = config.n_head * config.head_dim
        n_qkv = width + 2 * config.n_kv_head * config.head_dim
        parts = config.attention
        return Attention(
            Linear.init(config.n_embd, n_qkv, bias=parts.qkv_bias, std=std, key=key_qkv),
            Linear.init(width, config.n_embd, bias=parts.out_bias, std=out_std, key=key_out),
            config,
        )

    def __call__(
        self,
        x: Hidden,
        *,
        cache: KVCache | None = None,
        layer: int | jax.Array = 0,
        key: PRNGKey | None = None,
    ) -> tuple[Hidden, KVCache | None]:
        """Attend within `x`, or from `x` to all that `layer` of the cache holds and to `x`."""
        config = self.config
        *batch, seq, _ = x.shape
        n_q, n_kv = config.n_head, config.n_kv_head
        heads = self.qkv(x).reshape(*batch, seq, n_q + 2 * n_kv, config.head_dim)
        q, k, v = jnp.split(heads, [n_q, n_q + n_kv], axis=-2)
        offset = 0 if cache is None else cache.length
        if config.position.kind == "rope":
            positions = offset + jnp.arange(seq)
            q = rotate(q, positions, config.position.rope_theta)
            k = rotate(k, positions, config.position.rope_theta)
        if cache is not None:
            cache, k, v = cache.append(layer, k, v)
        mixed = causal_attention(q, k, v, offset=offset, dropout_rate=config.dropout, key=key)
        return self.out(mixed.reshape(*batch, seq, n_q * config.head_dim)), cache
