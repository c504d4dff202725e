"""Matrix products, above all of activations with weights that lie as (out, in).

XLA's CPU backend has fast bfloat16 products (twice as fast as float32's) for one arrangement
alone, called canonical here: float32 out of bfloat16 `[..., m, k]` and `[..., k, n]` or
`[..., n, k]`, both row-major. Everything else it converts to float32 first. So on CPUs transposes
are carried out, which costs little beside a product, and barriers keep the compiler from undoing
that: a transpose that it folds into a product makes it a slow one, or, on the way out, one that it
cannot run. Where a training command asks for it, `onednn.py` has linear maps instead.
On other platforms a product is a product and a transpose a transpose, for XLA to fold.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from eqx_gpt.ops import onednn
from eqx_gpt.ops.few_rows import (
    FEW_ROWS,
    linear_few_rows,
    linear_few_rows_int8,
    weights_come_first,
)
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.ops.platform import by_platform, laid_out
from eqx_gpt.ops.rounding import rounded


def linear(
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"] | Int8,
    bias: Float[Array, " out"] | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """`x @ weight.T + bias`, multiplied in the dtype of `x` and summed in float32; `dtype` is the
    result's, None for that of `x`."""
    dtype = x.dtype if dtype is None else dtype
    if isinstance(weight, Int8):
        y = _linear(x, weight.values)
        y = y * jnp.broadcast_to(weight.scale, y.shape)
    elif onednn.takes(x, weight, weight.shape[0]):
        return onednn.linear(x, weight, bias, dtype)
    else:
        y = _linear(x, weight)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return rounded(y, dtype)


def product(a: Float[Array, "*rows k"], b: Float[Array, "*batch k n"]) -> Float[Array, "*rows n"]:
    """`a @ b`, float32 whatever they are: of as many axes, or `b` has two."""
    return _product(a, b, transposed=False)


def product_transposed(
    a: Float[Array, "*rows k"], b: Float[Array, "*batch n k"]
) -> Float[Array, "*rows n"]:
    """`a @ swapaxes(b, -1, -2)`, and otherwise as `product`."""
    return _product(a, b, transposed=True)


def large_product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """`product` of two matrices, by oneDNN where it is asked for (see `onednn.py`)."""
    return onednn.product(a, b) if onednn.takes(a, b, b.shape[1]) else product(a, b)


def transposed(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n m"]:
    """The last two axes swapped, laid out as `product` wants it."""
    return row_major(jnp.swapaxes(x, -1, -2))


def row_major(x: Shaped[Array, "*batch m n"]) -> Shaped[Array, "*batch m n"]:
    """`x`, laid out as `product` wants it: on CPUs row-major, whatever made it."""
    if x.dtype != jnp.bfloat16:
        return x
    return by_platform(x, cpu=laid_out, default=lambda x: x)


def _linear(x: Array, weight: Array) -> Float[Array, "*batch out"]:
    n_row = math.prod(x.shape[:-1])
    if weight.dtype == jnp.int8 and n_row <= FEW_ROWS:
        return by_platform(x, weight, cpu=linear_few_rows_int8, default=_plain_linear)
    if x.dtype != jnp.bfloat16:
        return _plain_linear(x, weight)
    if weight.dtype == jnp.int8:
        weight = weight.astype(x.dtype)
    return _differentiable_linear(x, weight)


def _plain_linear(x: Array, weight: Array) -> Float[Array, "*batch out"]:
    return _plain_product(x, weight.astype(x.dtype), transposed=True)


# The weight is converted in here, so that its gradient is what the product gives, unrounded.
@jax.custom_vjp
def _differentiable_linear(x: Array, weight: Array) -> Float[Array, "*batch out"]:
    """This runs where no gradient is asked for."""
    weight = weight.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if weights_come_first(rows, weight):
        y = by_platform(rows, weight, cpu=linear_few_rows, default=_plain_linear)
        return y.reshape(*x.shape[:-1], -1)
    return product_transposed(x, weight)


def _linear_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return product_transposed(x, weight.astype(x.dtype)), (x, weight)


def _linear_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = residuals
    g = g.astype(x.dtype)
    d_x = rounded(product(g, weight.astype(x.dtype)), x.dtype)
    rows, d_rows = (y.reshape(-1, y.shape[-1]) for y in (x, g))
    # Of the two ways to the weight's gradient, the one that has less to transpose.
    if g.size <= x.size + weight.size:
        d_weight = product(transposed(d_rows), rows)
    else:
        d_weight = jnp.swapaxes(product(transposed(rows), d_rows), 0, 1)
    return d_x, d_weight.astype(weight.dtype)


_differentiable_linear.defvjp(_linear_forward, _linear_backward)


def _product(a: Array, b: Array, *, transposed: bool) -> Float[Array, "*rows n"]:
    plain = partial(_plain_product, transposed=transposed)
    if a.dtype != jnp.bfloat16:
        return plain(a, b)
    canonical = partial(_canonical_product, transposed=transposed)
    return by_platform(a, b, cpu=canonical, default=plain)


def _plain_product(a: Array, b: Array, *, transposed: bool) -> Float[Array, "*rows n"]:
    batch = tuple(range(b.ndim - 2))
    contract = ((a.ndim - 1,), (b.ndim - (1 if transposed else 2),))
    return lax.dot_general(a, b, (contract, (batch, batch)), preferred_element_type=jnp.float32)


def _canonical_product(a: Array, b: Array, *, transposed: bool) -> Float[Array, "*rows n"]:
    rows = a.reshape(-1, a.shape[-1]) if b.ndim == 2 else a
    rows, b = lax.optimization_barrier((rows, b))
    y = lax.optimization_barrier(_plain_product(rows, b, transposed=transposed))
    return y.reshape(*a.shape[:-1], y.shape[-1])
