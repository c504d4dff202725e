"""A number that tells whether an array is, bit for bit, the one that was saved.

Storage formats check their indices and not all of the numbers, so that a flipped bit of a weight
would go unseen. The sum below is computed where the array lies, in one pass, and does not depend on
how it is sharded.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32


def checksums(arrays: Mapping[str, Array]) -> dict[str, int]:
    """Name -> a number of 32 bits, of arrays of any dtype."""
    return {name: int(value) for name, value in _checksums(dict(arrays)).items()}


@jax.jit
def _checksums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {name: _checksum(x) for name, x in arrays.items()}


def _checksum(x: Array) -> UInt32[Array, ""]:
    """The sum of bits times place, modulo 2^32; the factors are odd, so every single change of a
    number changes it."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize > 4:
        x = lax.bitcast_convert_type(x, jnp.uint32)
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        step = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place * jnp.uint32(size % 2**32) + step
    factor = place * jnp.uint32(2) + jnp.uint32(1)
    return jnp.sum(bits * factor, dtype=jnp.uint32)
