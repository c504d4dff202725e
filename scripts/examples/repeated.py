"""What the examples measure on tokens that are said twice: the loss where they can be known."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eqx_gpt.shapes import Scalar


def second_half_loss(
    logits: Float[Array, "batch seq vocab"], tokens: Int[Array, "batch seq"]
) -> Scalar:
    """Nats a token of the second half, but for its first one, which nothing tells."""
    half = tokens.shape[-1] // 2
    log_p = jax.nn.log_softmax(logits[:, half:-1])
    targets = jnp.asarray(tokens)[:, half + 1 :, None]
    return -jnp.mean(jnp.take_along_axis(log_p, targets, axis=-1))
