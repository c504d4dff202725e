"""The exponential of numbers up to 0, no more exact than its result's dtype can hold it."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eqx_gpt.ops.platform import by_platform

# The cubic that is nearest to 2^x, relatively, for x in [-1/2, 1/2]: off by 1e-4, an eighth of
# the rounding to bfloat16.
_CUBIC = (0.99992807, 0.69326099, 0.24261112, 0.05517166)


def exp_of_negative(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """exp(x) for float32 x <= 0, of a result that will be rounded to `dtype`."""
    if dtype != jnp.bfloat16:
        return jnp.exp(x)
    return by_platform(x, cpu=_cubic_exp, default=jnp.exp)


@jax.custom_jvp
def _cubic_exp(x: Array) -> Array:
    # 2^(whole + rest), the whole added to the exponent's bits. Below 2^-126 it is that.
    power = jnp.maximum(x * math.log2(math.e), -126.0)
    whole = lax.round(power, lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = power - whole
    c0, c1, c2, c3 = _CUBIC
    fraction = c0 + rest * (c1 + rest * (c2 + rest * c3))
    bits = lax.bitcast_convert_type(fraction, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)


@_cubic_exp.defjvp
def _cubic_exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Bits have no gradient of their own.
    y = _cubic_exp(*primals)
    return y, y * tangents[0]
