"""Products with few rows on a CPU, as in decoding and prefill: handling the weights is what costs.

XLA's fast products copy their right side into another order at each call, but read the left one as
it lies. So the weights, (out, in), come first and the rows are transposed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Int32

from eqx_gpt.ops.platform import laid_out

FEW_ROWS = 64


def weights_come_first(rows: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> bool:
    """Whether that order is the faster one: up to 1024 rows there is less to transpose."""
    n_row, n_in = rows.shape
    return n_row <= 1024 and n_row * (n_in + len(weight)) <= 2 * weight.size


def linear_few_rows(
    rows: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """`rows @ weight.T`, float32."""
    return _product(weight, rows, jnp.float32)


@jax.custom_jvp
def linear_few_rows_int8(
    x: Float[Array, "*batch in"], weight: Int8[Array, "out in"]
) -> Float[Array, "*batch out"]:
    """`x @ weight.T` for at most `FEW_ROWS` rows, float32: `x` becomes integers too, and all is
    summed exactly.

    A number of `x` is written in digits of eight bits: the nearest multiple of 1/127 of its row's
    largest, then what is missing in steps of 1/254 of that. Two digits are off by about 2**-16 of
    the row's largest, where bfloat16 is by 2**-9 of itself; the third that float32 has, by 2**-24.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    largest = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / 127)
    digits, rest = [], rows / scale
    for _ in range(2 if x.dtype == jnp.bfloat16 else 3):
        digits.append(jnp.round(rest))
        rest = (rest - digits[-1]) * 254
    products = _product(weight, jnp.concatenate(digits).astype(jnp.int8), jnp.int32)
    *others, y = jnp.split(products.astype(jnp.float32), len(digits))
    for product in reversed(others):
        y = product + y / 254
    return (y * scale).reshape(*x.shape[:-1], -1)


@linear_few_rows_int8.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    """The slope of the product: its digits, rounded, have none."""
    (x, weight), (dx, _) = primals, tangents
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    dy = lax.dot_general(
        dx, weight.astype(dx.dtype), contract_last, preferred_element_type=jnp.float32
    )
    return linear_few_rows_int8(x, weight), dy


def _product(
    weight: Array, rows: Array, dtype: type
) -> Float[Array, "rows out"] | Int32[Array, "rows out"]:
    """`rows @ weight.T`, as the transpose of `weight @ rows.T`.

    The barriers keep XLA from turning that round, and from converting whole weights ahead of a
    loop over tokens. One row becomes two: of a single column it would make a plain loop.
    """
    n_row, n_in = rows.shape
    two = jnp.broadcast_to(rows, (2, n_in)) if n_row == 1 else rows
    columns = laid_out(two.T)
    weight, columns = lax.optimization_barrier((weight, columns))
    contract = (((1,), (0,)), ((), ()))
    y = lax.dot_general(weight, columns, contract, preferred_element_type=dtype)
    return lax.optimization_barrier(y)[:, :n_row].T


def unconverted(
    table: Float[Array, "rows d"], ids: Int[Array, "*batch"]
) -> tuple[Float[Array, "rows d"], Int[Array, "*batch"]]:
    """A table and the few rows to look up in it: the others are not read."""
    return lax.optimization_barrier((table, ids))
