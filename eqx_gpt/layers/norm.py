"""Layer norm and RMS norm."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eqx_gpt.config import NormConfig


class Norm(eqx.Module):
    """Normalise the last axis, with statistics in float32 whatever the dtype of `x`."""

    weight: Float[Array, " d"] | None
    bias: Float[Array, " d"] | None
    config: NormConfig = eqx.field(static=True)

    @staticmethod
    def init(config: NormConfig, width: int) -> "Norm":
        """A norm that scales by 1."""
        match config.scale:
            case "weight":
                weight = jnp.ones(width, jnp.float32)
            case "one_plus_weight":
                weight = jnp.zeros(width, jnp.float32)
            case "none":
                weight = None
        return Norm(weight, jnp.zeros(width, jnp.float32) if config.bias else None, config)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = x.astype(jnp.float32)
        if self.config.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.eps)
        if self.weight is not None:
            scale = self.weight.astype(jnp.float32)
            scale = 1 + scale if self.config.scale == "one_plus_weight" else scale
            y = y * jnp.broadcast_to(scale, y.shape)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(jnp.float32), y.shape)
        return y.astype(x.dtype)
