"""From float32 to bfloat16 and back, where it happens within other work, and sums so rounded.

XLA's CPU backend makes loops that end in such a conversion half as fast as memory is: with the
rounding in integers they are vectorized whole. The numbers are the same.

But what it takes for cheap, such integers among it, it makes anew in each loop that reads it, with
all that this was made of. So `rounded` is for what one reads, and `rounded_once` for what goes on
from layer to layer.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eqx_gpt.ops.platform import by_platform


def rounded(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """`x.astype(dtype)`: to the nearest, of two as near to the even one."""
    return _rounded_by(_rounded_by_integers, x, dtype)


def rounded_once(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """`rounded`, of which XLA's CPU backend writes the result down for all who read it."""
    return _rounded_by(_rounded_and_stored, x, dtype)


def widened(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x.astype(jnp.float32)`, whose gradient is `rounded`. Of bfloat16 it has no forward-mode
    derivative, like the products around it."""
    return _widened(x) if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def _rounded_by(on_cpu: Callable[[Array], Array], x: Array, dtype: DTypeLike) -> Array:
    if x.dtype == jnp.float32 and dtype == jnp.bfloat16:
        return _rounded(on_cpu, x)
    return x.astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded(on_cpu: Callable[[Array], Array], x: Array) -> Array:
    return by_platform(x, cpu=on_cpu, default=lambda x: x.astype(jnp.bfloat16))


@_rounded.defjvp
def _rounded_jvp(
    on_cpu: Callable[[Array], Array], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    # Bits have no gradient of their own.
    return _rounded(on_cpu, *primals), tangents[0].astype(jnp.bfloat16)


@jax.custom_vjp
def _widened(x: Array) -> Array:
    return x.astype(jnp.float32)


_widened.defvjp(lambda x: (x.astype(jnp.float32), None), lambda _, g: (rounded(g, jnp.bfloat16),))


def _rounded_by_integers(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + 0x7FFF + ((bits >> 16) & 1)
    bits = jnp.where(x == x, up, bits | 0x400000)  # what is not a number stays none
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _rounded_and_stored(x: Array) -> Array:
    # By itself XLA takes a conversion there and back for none, and goes on with what was not
    # rounded. A conversion is dear to it: integers are not.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


@jax.custom_jvp
def added(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x + y`, of the same dtype, `rounded_once`."""

    def on_cpu(x: Array, y: Array) -> Array:
        return _rounded_and_stored(x.astype(jnp.float32) + y.astype(jnp.float32))

    if x.dtype != jnp.bfloat16:
        return x + y
    return by_platform(x, y, cpu=on_cpu, default=jnp.add)


@added.defjvp
def _added_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return added(*primals), jnp.add(*tangents)
