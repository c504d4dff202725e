"""Rotary positions (Su et al. 2021, arXiv:2104.09864), in the half-split form of Llama."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "*batch seq head head_dim"], positions: Int[Array, " seq"], theta: float
) -> Float[Array, "*batch seq head head_dim"]:
    """Rotate the pair (x[i], x[i + head_dim/2]) by the angle position * theta^(-2i/head_dim).

    Angles are float32: in bfloat16 the positions beyond 256 would run together.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None, None] * frequency[None, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.broadcast_to(jnp.cos(angle), a.shape), jnp.broadcast_to(jnp.sin(angle), a.shape)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
