"""Layer norm and RMS norm."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqx_gpt.config import NormConfig
from eqx_gpt.ops.normalize import normalize, normalize_beside


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
        return normalize(x, self._scale(), self.bias, self.config.kind, self.config.eps)

    def beside(
        self, x: Float[Array, "*batch d"]
    ) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
        """`x` to go on with, and normalised: see `normalize_beside`."""
        return normalize_beside(x, self._scale(), self.bias, self.config.kind, self.config.eps)

    def _scale(self) -> Float[Array, " d"] | None:
        if self.weight is not None and self.config.scale == "one_plus_weight":
            return 1 + self.weight.astype(jnp.float32)
        return self.weight
