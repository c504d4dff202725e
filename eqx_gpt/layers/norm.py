"""Layer norm and RMS norm."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eqx_gpt.config import NormConfig


class Norm(eqx.Module):
    """Normalise the last axis, with statistics in float32 whatever the dtype of `x`."""

    weight: Float[Array, " d"]
    bias: Float[Array, " d"] | None
    kind: Literal["layernorm", "rmsnorm"] = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    @staticmethod
    def init(config: NormConfig, width: int) -> "Norm":
        bias = jnp.zeros(width, jnp.float32) if config.bias else None
        return Norm(jnp.ones(width, jnp.float32), bias, config.kind, config.eps)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * jnp.broadcast_to(self.weight.astype(jnp.float32), y.shape)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(jnp.float32), y.shape)
        return y.astype(x.dtype)
