"""Matrix products, above all of activations with weights that lie as (out, in).

XLA's CPU backend has fast bfloat16 products (twice as fast as float32's) for one arrangement
alone, called canonical here: float32 out of bfloat16 `[..., m, k]` and `[..., k, n]` or
`[..., n, k]`, both row-major. Everything else it converts to float32 first. So on CPUs transposes
are carried out, which costs little beside a product, and barriers keep the compiler from undoing
that: a transpose that it folds into a product makes it a slow one, or, on the way out, one that it
cannot run. Where a training command asks for it, large products are by `onednn.py` instead.
On other platforms a product is a product and a transpose a transpose, for XLA to fold.
"""

import math
from collections.abc import Callable
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
        return _onednn_linear(x, weight, bias, dtype)
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
    return _onednn_product(a, b) if onednn.takes(a, b, b.shape[1]) else product(a, b)


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
    return d_x, _gradient_of_weight(product, _rows(x), _rows(g), weight)


_differentiable_linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _onednn_linear(
    x: Array, weight: Array, bias: Array | None, dtype: DTypeLike
) -> Float[Array, "*batch out"]:
    return _onednn_forward(x, weight, bias, dtype)[0]


def _onednn_forward(
    x: Array, weight: Array, bias: Array | None, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    row = None if bias is None else bias.astype(jnp.float32)[None]
    y = _onednn_product(_rows(x), weight.astype(x.dtype), row, transposed=True, dtype=dtype)
    return y.reshape(*x.shape[:-1], -1), (x, weight, bias)


def _onednn_backward(
    dtype: DTypeLike, residuals: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array, Array | None]:
    x, weight, bias = residuals
    rows, d_rows = _rows(x), _rows(g.astype(x.dtype))
    d_x = _onednn_product(d_rows, weight.astype(x.dtype), dtype=x.dtype).reshape(x.shape)
    # It multiplies transposed operands too, at half the rate.
    d_weight = _gradient_of_weight(_onednn_product, rows, d_rows, weight)
    d_bias = None if bias is None else jnp.sum(_rows(g).astype(jnp.float32), 0).astype(bias.dtype)
    return d_x, d_weight, d_bias


_onednn_linear.defvjp(_onednn_forward, _onednn_backward)


def _gradient_of_weight(
    multiplied: Callable[[Array, Array], Array], rows: Array, d_rows: Array, weight: Array
) -> Array:
    """Of the two ways to it, by the one that has less to transpose."""
    if d_rows.size <= rows.size + weight.size:
        d_weight = multiplied(transposed(d_rows), rows)
    else:
        d_weight = jnp.swapaxes(multiplied(transposed(rows), d_rows), 0, 1)
    return d_weight.astype(weight.dtype)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _product(a: Array, b: Array, *, transposed: bool) -> Float[Array, "*rows n"]:
    plain = partial(_plain_product, transposed=transposed)
    if a.dtype != jnp.bfloat16:
        return plain(a, b)
    canonical = partial(_canonical_product, transposed=transposed)
    return by_platform(a, b, cpu=canonical, default=plain)


def _onednn_product(
    a: Array,
    b: Array,
    bias: Array | None = None,
    *,
    transposed: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "m n"]:
    """`onednn.product`, in programs for CPUs."""

    def plain(a: Array, b: Array, bias: Array | None) -> Array:
        y = _plain_product(a, b, transposed=transposed)
        if bias is not None:
            y = y + jnp.broadcast_to(bias, y.shape)
        return y.astype(dtype)

    by_onednn = partial(onednn.product, transposed=transposed, dtype=dtype)
    return by_platform(a, b, bias, cpu=by_onednn, default=plain)


def _plain_product(a: Array, b: Array, *, transposed: bool) -> Float[Array, "*rows n"]:
    batch = tuple(range(b.ndim - 2))
    contract = ((a.ndim - 1,), (b.ndim - (1 if transposed else 2),))
    return lax.dot_general(a, b, (contract, (batch, batch)), preferred_element_type=jnp.float32)


def _canonical_product(a: Array, b: Array, *, transposed: bool) -> Float[Array, "*rows n"]:
    rows = a.reshape(-1, a.shape[-1]) if b.ndim == 2 else a
    rows, b = lax.optimization_barrier((rows, b))
    y = lax.optimization_barrier(_plain_product(rows, b, transposed=transposed))
    return y.reshape(*a.shape[:-1], y.shape[-1])
