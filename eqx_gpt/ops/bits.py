"""bfloat16 as integers, for what only moves numbers.

XLA's CPU backend copies, concatenates and updates bfloat16 by way of float32, and an update in
place of a part by converting the whole; integers it moves as they are.
"""

from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from eqx_gpt.ops.platform import by_platform


def as_bits(x: Array) -> Array:
    """bfloat16 as integers, anything else as it is."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: Array, dtype: DTypeLike) -> Array:
    """What `as_bits` was made from."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def concatenated(parts: tuple[Array, ...], axis: int) -> Array:
    """Along an axis, on a CPU."""
    bits = jnp.concatenate([as_bits(x) for x in parts], axis=axis)
    return from_bits(bits, parts[0].dtype)


@concatenated.defjvp
def _(axis: int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # Bits have no gradient of their own.
    return concatenated(primals[0], axis), jnp.concatenate(tangents[0], axis=axis)


def split(x: Array, sizes: tuple[int, ...], axis: int) -> tuple[Array, ...]:
    """`x` in parts of these sizes, whose gradients are put together by `concatenated`."""
    parts: Any = _split(x, sizes, axis)
    return parts


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _split(x: Array, sizes: tuple[int, ...], axis: int) -> tuple[Array, ...]:
    return tuple(jnp.split(x, list(accumulate(sizes[:-1])), axis=axis))


def _split_backward(
    _sizes: tuple[int, ...], axis: int, _: None, parts: tuple[Array, ...]
) -> tuple[Array]:
    def on_cpu(*parts: Array) -> Array:
        return concatenated(parts, axis)

    def plain(*parts: Array) -> Array:
        return jnp.concatenate(parts, axis=axis)

    return (by_platform(*parts, cpu=on_cpu, default=plain),)


_split.defvjp(lambda x, sizes, axis: (_split(x, sizes, axis), None), _split_backward)
