"""Products with few rows on a CPU, as in decoding: reading the weights is all the work there.

The barriers keep XLA from what would read or write them more than once: converting whole weights
ahead of a loop over tokens, and taking a product apart to add a bias in it.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

FEW_ROWS = 64


def linear_few_rows(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"] | Int8[Array, "out in"]
) -> Float[Array, "*batch out"]:
    """`x @ weight.T` for at most `FEW_ROWS` rows, float32.

    One row: XLA puts the conversion of the weights, written with this transpose, into the loop of
    the product, so that they are read once and as they lie. More rows would convert them anew for
    each row: there the product of bfloat16 numbers is the faster one.
    """
    *batch, n_in = x.shape
    rows, weight = lax.optimization_barrier((x.reshape(-1, n_in), weight))
    if math.prod(batch) == 1:
        y = rows.astype(jnp.float32) @ weight.astype(jnp.float32).T
    else:
        contract_last = (((1,), (1,)), ((), ()))
        weight = weight.astype(x.dtype)
        y = lax.dot_general(rows, weight, contract_last, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(y).reshape(*batch, -1)


def unconverted(
    table: Float[Array, "rows d"], ids: Int[Array, "*batch"]
) -> tuple[Float[Array, "rows d"], Int[Array, "*batch"]]:
    """A table and the few rows to look up in it: the others are not read."""
    return lax.optimization_barrier((table, ids))
