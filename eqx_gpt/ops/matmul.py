"""Matrix products, above all of activations with weights that lie as (out, in).

XLA's CPU backend has fast bfloat16 products (twice as fast as float32's) for one arrangement
alone, called canonical here: float32 out of bfloat16 `[..., m, k]` and `[..., k, n]` or
`[..., n, k]`, both row-major. Everything else it converts to float32 first. So on CPUs transposes
are carried out, which costs little beside a product, and barriers keep the compiler from undoing
that: a transpose that it folds into a product makes it a slow one, or, on the way out, one that it
cannot run.
A large one also ends, on CPUs, before its results leave the caches: see `_ending_in_caches`.
On other platforms a product is a product and a transpose a transpose, for XLA to fold.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from eqx_gpt.ops.bits import as_bits
from eqx_gpt.ops.few_rows import (
    FEW_ROWS,
    linear_few_rows,
    linear_few_rows_int8,
    weights_come_first,
)
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.ops.meshed import mesh_here
from eqx_gpt.ops.platform import by_platform, laid_out
from eqx_gpt.ops.rounding import rounded

_LARGE = 2**29  # multiplications: below, one core is as fast by itself
_LONG = 2**13  # columns of a result, or terms of a sum
NEAR = "some of a large product's result"  # names what its gradients' products keep of it
_SOME = 2**11  # numbers: the fewest whose bytes XLA's library wants to sum


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
    else:
        y = _linear(x, weight, dtype if bias is None else jnp.float32)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return rounded(y, dtype)


def product(
    a: Float[Array, "*rows k"],
    b: Float[Array, "*batch k n"],
    dtype: DTypeLike = jnp.float32,
    near: Shaped[Array, " some"] | None = None,
) -> Float[Array, "*rows n"]:
    """`a @ b`, summed in float32 whatever they are: of as many axes, or `b` has two. `near` is for
    `_ending_in_caches`."""
    return _product(a, b, dtype, near, transposed=False)


def product_transposed(
    a: Float[Array, "*rows k"],
    b: Float[Array, "*batch n k"],
    dtype: DTypeLike = jnp.float32,
    near: Shaped[Array, " some"] | None = None,
) -> Float[Array, "*rows n"]:
    """`a @ swapaxes(b, -1, -2)`, and otherwise as `product`."""
    return _product(a, b, dtype, near, transposed=True)


def transposed(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n m"]:
    """The last two axes swapped, laid out as `product` wants it."""
    return row_major(jnp.swapaxes(x, -1, -2))


def row_major(x: Shaped[Array, "*batch m n"]) -> Shaped[Array, "*batch m n"]:
    """`x`, laid out as `product` wants it: on CPUs row-major, whatever made it."""
    if x.dtype != jnp.bfloat16:
        return x
    return by_platform(x, cpu=laid_out, default=lambda x: x)


def _linear(x: Array, weight: Array, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch out"]:
    n_row = math.prod(x.shape[:-1])
    if weight.dtype == jnp.int8 and n_row <= FEW_ROWS:
        return by_platform(x, weight, cpu=linear_few_rows_int8, default=_plain_linear)
    if x.dtype != jnp.bfloat16:
        return _plain_linear(x, weight)
    if weight.dtype == jnp.int8:
        weight = weight.astype(x.dtype)
    return _differentiable_linear(x, weight, dtype)


def _plain_linear(x: Array, weight: Array) -> Float[Array, "*batch out"]:
    return _plain_product(x, weight.astype(x.dtype), transposed=True)


# The weight is converted in here, so that its gradient is what the product gives, unrounded.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _differentiable_linear(x: Array, weight: Array, dtype: DTypeLike) -> Float[Array, "*batch out"]:
    """This runs where no gradient is asked for."""
    weight = weight.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if weights_come_first(rows, weight):
        y = by_platform(rows, weight, cpu=linear_few_rows, default=_plain_linear)
        return rounded(y.reshape(*x.shape[:-1], -1), dtype)
    return product_transposed(x, weight, dtype)


def _linear_forward(
    x: Array, weight: Array, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    large = x.size * len(weight) >= _LARGE and mesh_here() is None
    rounded_weight = weight.astype(x.dtype)
    near = _some(rounded_weight) if large else None
    y = product_transposed(x, rounded_weight, dtype, near)
    # Named, so that what is computed again in the backward pass is not computed for this.
    return y, (x, weight, checkpoint_name(_some(y), NEAR) if large else None)


def _linear_backward(
    _dtype: DTypeLike, residuals: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array]:
    x, weight, near = residuals
    g = g.astype(x.dtype)
    d_x = product(g, weight.astype(x.dtype), x.dtype, near)
    near = None if near is None else _some(d_x)
    rows, d_rows = (y.reshape(-1, y.shape[-1]) for y in (x, g))
    # Of the two ways to the weight's gradient, the one that has less to transpose.
    if g.size <= x.size + weight.size:
        d_weight = product(transposed(d_rows), rows, near=near)
    else:
        d_weight = jnp.swapaxes(product(transposed(rows), d_rows, near=near), 0, 1)
    return d_x, d_weight.astype(weight.dtype)


_differentiable_linear.defvjp(_linear_forward, _linear_backward)


def _product(
    a: Array, b: Array, dtype: DTypeLike, near: Array | None, *, transposed: bool
) -> Array:
    def plain(a: Array, b: Array, _: Array | None) -> Array:
        return _plain_product(a, b, transposed=transposed).astype(dtype)

    def canonical(a: Array, b: Array, near: Array | None) -> Array:
        return _canonical_product(a, b, dtype, near, transposed=transposed)

    if a.dtype != jnp.bfloat16:
        return plain(a, b, near)
    return by_platform(a, b, near, cpu=canonical, default=plain)


def _plain_product(a: Array, b: Array, *, transposed: bool) -> Float[Array, "*rows n"]:
    batch = tuple(range(b.ndim - 2))
    contract = ((a.ndim - 1,), (b.ndim - (1 if transposed else 2),))
    return lax.dot_general(a, b, (contract, (batch, batch)), preferred_element_type=jnp.float32)


def _canonical_product(
    a: Array, b: Array, dtype: DTypeLike, near: Array | None, *, transposed: bool
) -> Array:
    rows = a.reshape(-1, a.shape[-1]) if b.ndim == 2 else a
    rows, b = lax.optimization_barrier((rows, b))
    y = _plain_product(rows, b, transposed=transposed)
    shape = (*a.shape[:-1], y.shape[-1])
    # Of a square result the library's loops are slow if anything follows in them.
    if near is not None and y.shape[0] != y.shape[1] and max(rows.shape[1], y.shape[1]) <= _LONG:
        y = _ending_in_caches(y, near)
        return lax.optimization_barrier(y.reshape(shape).astype(dtype))
    return rounded(lax.optimization_barrier(y).reshape(shape), dtype)


def _ending_in_caches(y: Float[Array, "m n"], near: Shaped[Array, " some"]) -> Array:
    """`y`, a product, and what is done to each of its numbers next, as one work of XLA's library.

    By itself a product writes its sums to memory several times before they are complete, and what
    follows reads them again. The library does both at once for what belongs together, and what
    does XLA decides by beginning at a sum: so one is added, over bytes of `near`, which is always
    zero. What follows ends where a second thing is made of a result. `near` should be there
    already, or be what is to come before.
    """
    some = lax.bitcast_convert_type(near, jnp.uint8).reshape(-1)
    some = lax.optimization_barrier(some).astype(jnp.float32)
    return y + jnp.broadcast_to(jnp.max(some - some), y.shape)


def _some(x: Float[Array, "*shape"]) -> Shaped[Array, " some"]:
    """The first of `x` on CPUs, for `_ending_in_caches`."""

    def first(x: Array) -> Array:
        return as_bits(x).reshape(-1)[:_SOME]

    def none(x: Array) -> Array:
        return jnp.zeros(min(_SOME, x.size), as_bits(x).dtype)

    return by_platform(x, cpu=first, default=none)
