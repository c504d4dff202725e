"""Rows of a table."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eqx_gpt.ops.matmul import product
from eqx_gpt.ops.platform import by_platform

_ONE_HOT_ROWS = 1024


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table: Float[Array, "rows d"], ids: Int[Array, "*batch"], dtype: DTypeLike
) -> Float[Array, "*batch d"]:
    """table[ids] as `dtype`; the gradient of a row that is met often is summed in float32."""
    return table[ids].astype(dtype)


def _look_up_forward(
    table: Array, ids: Array, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    return table[ids].astype(dtype), (table, ids)


def _look_up_backward(
    dtype: DTypeLike, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, None]:
    table, ids = residuals
    n_row, ids, g = table.shape[0], ids.reshape(-1), g.reshape(-1, g.shape[-1])

    def scatter(ids: Array, g: Array) -> Array:
        return jnp.zeros(table.shape, jnp.float32).at[ids].add(g.astype(jnp.float32))

    def multiply(ids: Array, g: Array) -> Array:
        one_hot = (jnp.arange(n_row)[:, None] == ids[None, :]).astype(g.dtype)
        return product(one_hot, g)

    # A CPU scatters one number at a time.
    on_cpu = multiply if n_row <= _ONE_HOT_ROWS else scatter
    d_table = by_platform(ids, g, cpu=on_cpu, default=scatter)
    return d_table.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)
