"""The training objective."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from eqx_gpt.gpt import GPT
from eqx_gpt.ops.cross_entropy import cross_entropy
from eqx_gpt.shapes import PRNGKey, Scalar
from eqx_gpt.tree import cast


def next_token_loss(
    model: GPT,
    windows: Int[Array, "*batch seq_plus_1"],
    *,
    dtype: DTypeLike = jnp.float32,
    key: PRNGKey | None = None,
) -> Scalar:
    """Mean cross-entropy, in nats a token, of each token of a window given those before it.

    The model computes in `dtype` with a copy of its weights; gradients reach the weights
    themselves. `key` None means no dropout.
    """
    computing = model if jnp.dtype(dtype) == jnp.float32 else cast(model, dtype)
    hidden, _ = computing.hidden(windows[..., :-1], key=key)
    weight, bias = computing.head_weight, computing.head_bias
    return cross_entropy(hidden, weight, windows[..., 1:], bias, model.config.logit_softcap)
