"""The key-value cache of decoding, as a PyTree."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eqx_gpt.config import GPTConfig


class KVCache(eqx.Module):
    """Keys and values of every layer for the first `length` positions of each sequence.

    Every layer has arrays of its own; they lie as the products of attention read them, with all
    sequences' heads on one axis, so that a new token is written in place: a reshape in between
    would make XLA copy the cache for every token. `start` says where each sequence begins, None
    for at 0; what stands before is padding. `empty` is known while tracing, so that a prompt,
    which has only itself to attend to, takes the path of whole sequences.
    """

    k: tuple[Float[Array, "batch_kv_head cache head_dim"], ...]
    v: tuple[Float[Array, "batch_kv_head cache head_dim"], ...]
    length: Int[Array, ""]
    start: Int[Array, "*batch"] | None
    empty: bool = eqx.field(static=True)

    @staticmethod
    def init(
        config: GPTConfig,
        batch: Sequence[int],
        capacity: int,
        dtype: DTypeLike = jnp.float32,
        start: Int[Array, "*batch"] | None = None,
    ) -> "KVCache":
        """An empty cache with room for `capacity` positions.

        Its first `advance` changes the structure (`empty`): to carry it through a `lax.scan`, give
        that `init(...).advance(0)`.
        """
        shape = (math.prod(batch) * config.n_kv_head, capacity, config.head_dim)
        k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer)) for _ in "kv")
        return KVCache(k, v, jnp.zeros((), jnp.int32), start, True)

    def with_capacity(self, capacity: int) -> "KVCache":
        """The same with room for `capacity` positions, no fewer than it has."""

        def longer(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, capacity - x.shape[1]), (0, 0)))

        k, v = (tuple(map(longer, parts)) for parts in (self.k, self.v))
        return KVCache(k, v, self.length, self.start, self.empty)

    def positions(self, seq: int) -> Int[Array, "*batch seq"]:
        """Of the next `seq` tokens in their sequences; of padding, 0."""
        positions = self.length + jnp.arange(seq)
        if self.start is None:
            return positions
        shape = (*self.start.shape, seq)
        start = jnp.broadcast_to(self.start[..., None], shape)
        return jnp.maximum(jnp.broadcast_to(positions, shape) - start, 0)

    def append(
        self,
        layer: int,
        k: Float[Array, "*batch seq kv_head head_dim"],
        v: Float[Array, "*batch seq kv_head head_dim"],
    ) -> "KVCache":
        """With the new positions of one layer. `length` moves after the last one (`advance`)."""

        def written(old: Array, new: Array) -> Array:
            new = jnp.swapaxes(new, -3, -2).astype(old.dtype)
            start = (0, self.length, 0)
            return lax.dynamic_update_slice(old, new.reshape(len(old), -1, old.shape[-1]), start)

        all_k = (*self.k[:layer], written(self.k[layer], k), *self.k[layer + 1 :])
        all_v = (*self.v[:layer], written(self.v[layer], v), *self.v[layer + 1 :])
        return KVCache(all_k, all_v, self.length, self.start, self.empty)

    def advance(self, seq: int | Int[Array, ""]) -> "KVCache":
        """`seq` positions longer; fewer than were written drops the last ones."""
        return KVCache(self.k, self.v, self.length + seq, self.start, False)
