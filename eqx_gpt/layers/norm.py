"""Layer norm and RMS norm."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqx_gpt.config import NormConfig
from eqx_gpt.ops.pointwise import normalize


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
        config, scale = self.config, self.weight
        if scale is not None and config.scale == "one_plus_weight":
            scale = 1 + scale.astype(jnp.float32)
        return normalize(x, scale, self.bias, config.kind, config.eps)
