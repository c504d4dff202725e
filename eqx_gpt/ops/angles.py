"""Cosines and sines that many loops read."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from eqx_gpt.ops.platform import by_platform


def cos_and_sin(
    angle: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Of angles in radians, float32.

    XLA's CPU backend takes both for cheap and makes them anew in each loop that reads them, for
    each of its numbers. A division it takes for dear, and writes its result down: so on CPUs they
    are divided by their length, which is 1 but for rounding.
    """

    def divided(angle: Array) -> tuple[Array, Array]:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        length = jnp.sqrt(cos * cos + sin * sin)
        return cos / length, sin / length

    return by_platform(angle, cpu=divided, default=lambda angle: (jnp.cos(angle), jnp.sin(angle)))
