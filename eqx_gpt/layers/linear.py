"""Linear maps and tables of vectors."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eqx_gpt.ops.few_rows import FEW_ROWS, unconverted
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.ops.matmul import linear
from eqx_gpt.ops.platform import by_platform
from eqx_gpt.ops.pointwise import look_up
from eqx_gpt.shapes import PRNGKey


class Linear(eqx.Module):
    """x -> x @ weight.T + bias. Weights lie as (out, in), as in torch files."""

    weight: Float[Array, "out in"] | Int8
    bias: Float[Array, " out"] | None

    @staticmethod
    def init(n_in: int, n_out: int, *, bias: bool, std: float, key: PRNGKey) -> "Linear":
        """Normal weights of standard deviation `std`, zero biases."""
        weight = std * jax.random.normal(key, (n_out, n_in), jnp.float32)
        return Linear(weight, jnp.zeros(n_out, jnp.float32) if bias else None)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return linear(x, self.weight, self.bias)


class Embedding(eqx.Module):
    """A table of `rows` vectors of width `d`."""

    weight: Float[Array, "rows d"] | Int8

    @staticmethod
    def init(n_row: int, width: int, *, std: float, key: PRNGKey) -> "Embedding":
        return Embedding(std * jax.random.normal(key, (n_row, width), jnp.float32))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        if isinstance(self.weight, Int8):
            return self.weight[ids]
        table = self.weight
        if ids.size <= FEW_ROWS:
            table, ids = by_platform(table, ids, cpu=unconverted, default=lambda *both: both)
        return look_up(table, ids)
