"""Which steps are not taken: those with a gradient that is not finite or, if asked for, a spike.

PaLM went back and left out the data of its spikes (arXiv:2204.02311, 5.1); OLMo-core and levanter
leave out a step that stands out from the mean of the last 128. Here the gradient's norm is held
against their median, which a spike does not move.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eqx_gpt.shapes import Scalar

HISTORY = 128
_ENOUGH = HISTORY // 2


class BadSteps(ValueError):
    """Too many steps in a row were not taken; the message names the data of the last."""


class Guard(eqx.Module):
    """Part of the training state: a resumed run skips what the uninterrupted one does.

    `norms` are those of the last gradients taken, the newest last, NaN where there were none yet;
    `skipped` counts the steps not taken, `in_row` those since the last one that was.
    """

    norms: Float[Array, " history"]
    skipped: Int[Array, ""]
    in_row: Int[Array, ""]

    @staticmethod
    def init() -> "Guard":
        norms = jnp.full((HISTORY,), jnp.nan, jnp.float32)
        return Guard(norms, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def limit(self, skip_spikes: float) -> Scalar:
        """The largest norm that is no spike: infinite without `skip_spikes`, or too early."""
        if not skip_spikes:
            return jnp.asarray(jnp.inf, jnp.float32)
        enough = jnp.sum(jnp.isfinite(self.norms)) >= _ENOUGH
        return jnp.where(enough, skip_spikes * jnp.nanmedian(self.norms), jnp.inf)

    def takes(self, loss: Scalar, norm: Scalar, skip_spikes: float) -> Bool[Array, ""]:
        """Is a step with this loss and this norm of the gradient to be taken?"""
        return jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= self.limit(skip_spikes))

    def after(self, taken: Bool[Array, ""], norm: Scalar) -> "Guard":
        """Once a step was taken, or not."""
        norms = jnp.concatenate([self.norms[1:], norm[None]])
        missed = jnp.logical_not(taken).astype(jnp.int32)
        return Guard(
            jnp.where(taken, norms, self.norms),
            self.skipped + missed,
            jnp.where(taken, 0, self.in_row + 1),
        )

    def to_dict(self) -> dict[str, object]:
        """For JSON, and exactly: a float32 is a float64."""
        norms = np.asarray(self.norms)
        return {
            "norms": norms[np.isfinite(norms)].tolist(),
            "skipped": int(self.skipped),
            "in_row": int(self.in_row),
        }

    @staticmethod
    def from_dict(values: dict[str, object]) -> "Guard":
        """KeyError, TypeError or ValueError for what `to_dict` never wrote."""
        norms = np.full(HISTORY, np.nan, np.float32)
        found = np.asarray(values["norms"], np.float32).reshape(-1)
        norms[HISTORY - len(found) :] = found
        counts = [jnp.asarray(values[name], jnp.int32) for name in ("skipped", "in_row")]
        return Guard(jnp.asarray(norms), *counts)
