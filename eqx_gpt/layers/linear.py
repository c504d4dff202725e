"""Linear maps, what adapts them, and tables of vectors."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eqx_gpt.ops.few_rows import FEW_ROWS, unconverted
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.ops.look_up import look_up
from eqx_gpt.ops.matmul import linear
from eqx_gpt.ops.platform import by_platform
from eqx_gpt.shapes import PRNGKey


class LowRank(eqx.Module):
    """x -> scale * (x @ a.T) @ b.T: a change of low rank (LoRA, Hu et al. 2021,
    arXiv:2106.09685)."""

    a: Float[Array, "rank in"]
    b: Float[Array, "out rank"]
    scale: float = eqx.field(static=True)

    @staticmethod
    def init(n_in: int, n_out: int, *, rank: int, scale: float, key: PRNGKey) -> "LowRank":
        """No change yet: `b` is zero, `a` uniform in +-1 / sqrt(n_in), as in the authors' code."""
        limit = 1 / math.sqrt(n_in)
        a = jax.random.uniform(key, (rank, n_in), jnp.float32, -limit, limit)
        return LowRank(a, jnp.zeros((n_out, rank), jnp.float32), scale)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return linear(linear(x, self.a), self.b) * jnp.asarray(self.scale, x.dtype)


RESULT = "linear"  # the name by which a checkpoint policy keeps the results of linear maps


class Linear(eqx.Module):
    """x -> x @ weight.T + bias. Weights lie as (out, in), as in torch files.

    `lora` is an adapter, whose output is added (`eqx_gpt/lora.py`).
    """

    weight: Float[Array, "out in"] | Int8
    bias: Float[Array, " out"] | None
    lora: LowRank | None = None

    @staticmethod
    def init(n_in: int, n_out: int, *, bias: bool, std: float, key: PRNGKey) -> "Linear":
        """Normal weights of standard deviation `std`, zero biases."""
        weight = std * jax.random.normal(key, (n_out, n_in), jnp.float32)
        return Linear(weight, jnp.zeros(n_out, jnp.float32) if bias else None)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = linear(x, self.weight, self.bias)
        return checkpoint_name(y if self.lora is None else y + self.lora(x), RESULT)


class Embedding(eqx.Module):
    """A table of `rows` vectors of width `d`."""

    weight: Float[Array, "rows d"] | Int8

    @staticmethod
    def init(n_row: int, width: int, *, std: float, key: PRNGKey) -> "Embedding":
        return Embedding(std * jax.random.normal(key, (n_row, width), jnp.float32))

    def __call__(
        self, ids: Int[Array, "*batch"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch d"]:
        """The vectors at `ids`, as `dtype`, None for the table's."""
        table = self.weight
        if isinstance(table, Int8):
            return table[ids] if dtype is None else table[ids].astype(dtype)
        if ids.size <= FEW_ROWS:
            table, ids = by_platform(table, ids, cpu=unconverted, default=lambda *both: both)
        return look_up(table, ids, table.dtype if dtype is None else dtype)
