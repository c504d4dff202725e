"""From float32 to bfloat16 and back, where it happens within other work.

XLA's CPU backend makes loops that end in such a conversion half as fast as memory is: with the
rounding in integers they are vectorized whole. The numbers are the same.

But XLA takes such a conversion for dear, and writes its result down for all who read it. What is
rounded in integers it makes anew in each of their loops, with all that this was made of. So what
goes on from layer to layer, sums and norms and their gradients, is converted by `astype`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eqx_gpt.ops.platform import by_platform


def rounded(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """`x.astype(dtype)`: to the nearest, of two as near to the even one."""
    if x.dtype == jnp.float32 and dtype == jnp.bfloat16:
        return _rounded(x)
    return x.astype(dtype)


def widened(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x.astype(jnp.float32)`, whose gradient is `rounded`. Of bfloat16 it has no forward-mode
    derivative, like the products around it."""
    return _widened(x) if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


@jax.custom_jvp
def _rounded(x: Array) -> Array:
    return by_platform(x, cpu=_rounded_by_integers, default=lambda x: x.astype(jnp.bfloat16))


@_rounded.defjvp
def _rounded_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Bits have no gradient of their own.
    return _rounded(*primals), tangents[0].astype(jnp.bfloat16)


@jax.custom_vjp
def _widened(x: Array) -> Array:
    return x.astype(jnp.float32)


_widened.defvjp(lambda x: (x.astype(jnp.float32), None), lambda _, g: (_rounded(g),))


def _rounded_by_integers(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + 0x7FFF + ((bits >> 16) & 1)
    bits = jnp.where(x == x, up, bits | 0x400000)  # what is not a number stays none
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
