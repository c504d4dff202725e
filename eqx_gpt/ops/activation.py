"""Activations, whose gradients keep the inputs alone.

They compute in float32 and give the dtype of their input. Of what will be bfloat16 the slopes are
written out, each from one exponential.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eqx_gpt.ops.exp import exp_of_negative
from eqx_gpt.ops.platform import apart
from eqx_gpt.ops.rounding import rounded, widened

Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]


def _gelu(x: Array) -> Array:
    # As PyTorch writes it. jax.nn's has erfc for the digits of its tail, and takes twice as long.
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


_FORMULAS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


def _gelu_slope(x: Array) -> Array:
    power = exp_of_negative(-0.5 * jnp.square(x), jnp.bfloat16)
    # The normal distribution's tail: Abramowitz & Stegun 1964, 7.1.26, off by 1e-7.
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(x))
    terms = 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429
    series = terms[-1] * t
    for term in reversed(terms[:-1]):
        series = (series + term) * t
    tail = 0.5 * power * series
    below = jnp.where(x < 0, tail, 1 - tail)
    return below + x * power * (1 / math.sqrt(2 * math.pi))


def _sigmoid(x: Array) -> Array:
    power = exp_of_negative(-jnp.abs(x), jnp.bfloat16)
    above = 1 / (1 + power)
    return jnp.where(x < 0, power * above, above)


def _silu_slope(x: Array) -> Array:
    gate = _sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _gelu_tanh_slope(x: Array) -> Array:
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
    twice, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    square = jnp.square(x)
    gate = _sigmoid(twice * x * (1 + cubic * square))
    return gate + x * gate * (1 - gate) * (twice * (1 + 3 * cubic * square))


# Of float32 that will be rounded to bfloat16.
_SLOPES: dict[Activation, Callable[[Array], Array]] = {
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "silu": _silu_slope,
}


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _to_be_rounded(x: Array, narrow: Array, kind: Activation) -> Array:
    """`narrow` is `x` as bfloat16, of which the slope is made: behind `apart` it is widened in the
    loop that reads it, where `x` may be written to memory."""
    # Both GELUs take less time by their own formulas than from what their slopes need.
    return x * _sigmoid(x) if kind == "silu" else _FORMULAS[kind](x)


@_to_be_rounded.defjvp
def _(
    kind: Activation, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    x = apart(primals[1]).astype(jnp.float32)
    return _to_be_rounded(*primals, kind), _SLOPES[kind](x) * tangents[0]


def _activated(x: Array, kind: Activation) -> Float[Array, "*shape"]:
    """Float32, as exact as `x.dtype` can hold it."""
    if x.dtype == jnp.bfloat16 and kind in _SLOPES:
        return _to_be_rounded(widened(x), x, kind)
    return _FORMULAS[kind](widened(x))


@partial(jax.checkpoint, static_argnums=(1,))
def activate(x: Float[Array, "*shape"], kind: Activation) -> Float[Array, "*shape"]:
    """`kind` of each number: gelu (Hendrycks & Gimpel 2016, arXiv:1606.08415) exact or by its tanh
    formula, relu, relu squared (So et al. 2021, arXiv:2109.08668), silu."""
    return rounded(_activated(x, kind), x.dtype)


@partial(jax.checkpoint, static_argnums=(2,))
def activate_gated(
    gate: Float[Array, "*shape"], x: Float[Array, "*shape"], kind: Activation
) -> Float[Array, "*shape"]:
    """activation(gate) * x (Shazeer 2020, arXiv:2002.05202)."""
    return rounded(_activated(gate, kind) * widened(x), x.dtype)
