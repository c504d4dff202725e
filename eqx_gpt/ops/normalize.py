"""Layer norm and RMS norm, and their gradients.

They compute in float32 and give the dtype of their input. For the gradient the input is kept, and
a number or two a row. With gradients of their own they have no forward-mode derivative.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eqx_gpt.ops.few_rows import FEW_ROWS
from eqx_gpt.ops.matmul import product
from eqx_gpt.ops.meshed import mesh_here
from eqx_gpt.ops.platform import by_platform
from eqx_gpt.ops.rounding import rounded_once


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Float[Array, "*batch d"],
    scale: Float[Array, " d"] | None,
    bias: Float[Array, " d"] | None,
    kind: Literal["layernorm", "rmsnorm"],
    eps: float,
) -> Float[Array, "*batch d"]:
    """The last axis with variance 1 (layernorm: and mean 0; Ba et al. 2016, arXiv:1607.06450) or
    mean square 1 (Zhang & Sennrich 2019, arXiv:1910.07467), then `* scale + bias`."""
    return _forward(x, scale, bias, kind, eps)[0]


def _formula(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    kind: str,
    eps: float,
    mean: Array | None = None,
) -> tuple[Array, Array]:
    """The norm, and what each row is multiplied by; `mean` is a layer norm's, where it is known."""
    y = x.astype(jnp.float32)
    if kind == "layernorm":
        y = y - (jnp.mean(y, axis=-1, keepdims=True) if mean is None else mean)
    per_deviation = lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = _times(y * per_deviation, scale)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return rounded_once(y, x.dtype), per_deviation


def _forward(
    x: Array, scale: Array | None, bias: Array | None, kind: str, eps: float
) -> tuple[Array, tuple]:
    """The norm, and what its gradient needs."""
    mean = _row_means(x) if kind == "layernorm" else None
    y, per_deviation = _formula(x, scale, bias, kind, eps, mean)
    return y, (x, scale, bias, mean, per_deviation)


def _backward(
    kind: str, eps: float, residuals: tuple, dy: Array, d_beside: Array | None = None
) -> tuple[Array, Array | None, Array | None]:
    """`d_beside` is added to the gradient of `x`."""

    def plain(*args: Any) -> tuple[Array, Array | None, Array | None]:
        x, scale, bias, _mean, _per_deviation, dy, d_beside = args
        x = lax.optimization_barrier(x)  # lest what can be computed again is kept

        def formula(x: Array, scale: Array | None, bias: Array | None) -> Array:
            return _formula(x, scale, bias, kind, eps)[0]

        d_x, d_scale, d_bias = jax.vjp(formula, x, scale, bias)[1](dy)
        return d_x if d_beside is None else d_beside + d_x, d_scale, d_bias

    on_cpu = _by_sums if _rows_lie_here() else plain
    return by_platform(*residuals, dy, d_beside, cpu=on_cpu, default=plain)


def _by_sums(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    mean: Array | None,
    per_deviation: Array,
    dy: Array,
    d_beside: Array | None,
) -> tuple[Array, Array | None, Array | None]:
    y, wide_dy, width = x.astype(jnp.float32), dy.astype(jnp.float32), x.shape[-1]
    if mean is not None:
        y = y - mean
    y = y * per_deviation
    along = lax.optimization_barrier(wide_dy * y)
    factors = jnp.ones(width, jnp.float32) if scale is None else scale.astype(jnp.float32)
    d_y = _times(wide_dy, scale) - y * lax.optimization_barrier(_row_sums(along, factors) / width)
    if mean is not None:
        d_y = d_y - lax.optimization_barrier(_row_sums(dy, factors) / width)
    d_x = d_y * per_deviation
    if d_beside is not None:
        d_x = d_x + d_beside.astype(jnp.float32)
    rows = tuple(range(x.ndim - 1))
    d_scale = None if scale is None else jnp.sum(along, axis=rows).astype(scale.dtype)
    d_bias = None if bias is None else _column_sums(dy).astype(bias.dtype)
    return rounded_once(d_x, x.dtype), d_scale, d_bias


normalize.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize_beside(
    x: Float[Array, "*batch d"],
    scale: Float[Array, " d"] | None,
    bias: Float[Array, " d"] | None,
    kind: Literal["layernorm", "rmsnorm"],
    eps: float,
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
    """`x`, and `normalize(x, ...)`. On a CPU the gradient of what goes on with this `x` is added
    before anything is rounded, in the loop that makes the norm's."""
    return x, normalize(x, scale, bias, kind, eps)


def _forward_beside(
    x: Array, scale: Array | None, bias: Array | None, kind: str, eps: float
) -> tuple[tuple[Array, Array], tuple]:
    y, residuals = _forward(x, scale, bias, kind, eps)
    return (x, y), residuals


def _backward_beside(
    kind: str, eps: float, residuals: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array | None, Array | None]:
    return _backward(kind, eps, residuals, gradients[1], gradients[0])


normalize_beside.defvjp(_forward_beside, _backward_beside)


def _times(x: Array, scale: Array | None) -> Array:
    return x if scale is None else x * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)


def _rows_lie_here() -> bool:
    """Whether rows may be counted through: split over a mesh they would be gathered for that."""
    return mesh_here() is None


def _row_means(x: Array) -> Float[Array, "*batch 1"]:
    def plain(x: Array) -> Array:
        return jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)

    def by_product(x: Array) -> Array:
        sums = _row_sums(x, jnp.ones(x.shape[-1], jnp.float32))
        return lax.optimization_barrier(sums / x.shape[-1])

    many = x.size > FEW_ROWS * x.shape[-1] and _rows_lie_here()
    return by_platform(x, cpu=by_product if many else plain, default=plain)


def _row_sums(x: Array, factors: Float[Array, " d"]) -> Float[Array, "*batch 1"]:
    """Of `x * factors`, on a CPU, float32: as a product of two columns, for a sum that makes its
    terms itself is slow there, and so is a product of one column."""
    rows = x.reshape(-1, x.shape[-1])
    columns, rest = factors, jnp.zeros_like(factors)
    if x.dtype == jnp.bfloat16:  # what its digits leave over has a column of its own
        columns = factors.astype(x.dtype)
        rest = (factors - columns.astype(jnp.float32)).astype(x.dtype)
    else:
        rows = rows.astype(jnp.float32)
    sums = product(rows, jnp.stack([columns, rest], axis=1))
    return jnp.sum(sums, axis=-1).reshape(*x.shape[:-1], 1)


def _column_sums(x: Array) -> Float[Array, " d"]:
    """Over all but the last axis, on a CPU, float32."""
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype != jnp.bfloat16:
        return jnp.sum(rows.astype(jnp.float32), axis=0)
    return product(jnp.ones((2, len(rows)), x.dtype), rows)[0]
