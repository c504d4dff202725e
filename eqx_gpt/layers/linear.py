"""Linear maps and tables of vectors."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eqx_gpt.ops.matmul import linear
from eqx_gpt.shapes import PRNGKey


class Linear(eqx.Module):
    """x -> x @ weight.T + bias. Weights lie as (out, in), as in torch files."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"] | None

    @staticmethod
    def init(n_in: int, n_out: int, *, bias: bool, std: float, key: PRNGKey) -> "Linear":
        """Normal weights of standard deviation `std`, zero biases."""
        weight = std * jax.random.normal(key, (n_out, n_in), jnp.float32)
        return Linear(weight, jnp.zeros(n_out, jnp.float32) if bias else None)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = linear(x, self.weight)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias, y.shape)


class Embedding(eqx.Module):
    """A table of `rows` vectors of width `d`."""

    weight: Float[Array, "rows d"]

    @staticmethod
    def init(n_row: int, width: int, *, std: float, key: PRNGKey) -> "Embedding":
        return Embedding(std * jax.random.normal(key, (n_row, width), jnp.float32))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        return self.weight[ids]
