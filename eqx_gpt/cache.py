"""The key-value cache of decoding, as a PyTree."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eqx_gpt.config import GPTConfig


class KVCache(eqx.Module):
    """Keys and values of every layer for the first `length` positions of each sequence."""

    k: Float[Array, "layer *batch cache kv_head head_dim"]
    v: Float[Array, "layer *batch cache kv_head head_dim"]
    length: Int[Array, ""]

    @staticmethod
    def init(config: GPTConfig, batch: Sequence[int], capacity: int, dtype: DTypeLike) -> "KVCache":
        """An empty cache with room for `capacity` positions."""
        shape = (config.n_layer, *batch, capacity, config.n_kv_head, config.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    def append(
        self,
        layer: int | Int[Array, ""],
        k: Float[Array, "*batch seq kv_head head_dim"],
        v: Float[Array, "*batch seq kv_head head_dim"],
    ) -> tuple[
        "KVCache",
        Float[Array, "*batch cache kv_head head_dim"],
        Float[Array, "*batch cache kv_head head_dim"],
    ]:
        """Write the new positions of one layer; also give all keys and values of that layer.

        `length` stays: it moves once, after the last layer (`advance`).
        """
        start = [layer, *[0] * (k.ndim - 3), self.length, 0, 0]
        all_k = lax.dynamic_update_slice(self.k, k[None], start)
        all_v = lax.dynamic_update_slice(self.v, v[None], start)
        cache = KVCache(all_k, all_v, self.length)
        return cache, _at(all_k, layer), _at(all_v, layer)

    def advance(self, seq: int) -> "KVCache":
        return KVCache(self.k, self.v, self.length + seq)


def _at(x: jax.Array, index: int | jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, keepdims=False)
