"""Weights as eight-bit integers with a scale for each output."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from jaxtyping import Int8 as Int8Numbers


class Int8(eqx.Module):
    """A weight, (out, in), that stands for values * scale and is computed with in `dtype`.

    Symmetric: the largest number of each output's row becomes 127 or -127, so that no number is
    off by more than half its row's scale.
    """

    values: Int8Numbers[Array, "out in"]
    scale: Float[Array, " out"]
    dtype: np.dtype = eqx.field(static=True)

    @staticmethod
    def quantize(weight: Float[Array, "out in"]) -> "Int8":
        """The nearest such weight; it computes in the dtype of `weight`."""
        exact = weight.astype(jnp.float32)
        largest = jnp.max(jnp.abs(exact), axis=1)
        scale = jnp.where(largest == 0, 1, largest / 127)
        values = jnp.round(exact / scale[:, None])
        return Int8(values.astype(jnp.int8), scale, weight.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    def astype(self, dtype: DTypeLike) -> "Int8":
        """The same numbers, computed with in another dtype."""
        return Int8(self.values, self.scale, jnp.dtype(dtype))

    def __getitem__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch in"]:
        """Rows, as an array of the dtype."""
        scale = self.scale[ids][..., None]
        rows = self.values[ids].astype(jnp.float32)
        return (rows * jnp.broadcast_to(scale, rows.shape)).astype(self.dtype)
