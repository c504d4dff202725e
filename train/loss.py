"""The training objective."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from eqx_gpt.gpt import GPT
from eqx_gpt.ops.cross_entropy import cross_entropy
from eqx_gpt.ops.meshed import mesh_here
from eqx_gpt.shapes import PRNGKey, Scalar
from eqx_gpt.tree import cast
from train.packing import Packed


def next_token_loss(
    model: GPT,
    windows: Int[Array, "*batch seq_plus_1"] | Packed,
    *,
    dtype: DTypeLike = jnp.float32,
    key: PRNGKey | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Scalar:
    """Mean cross-entropy, in nats a token, of each token of a window given those before it.

    The model computes in `dtype`; gradients reach the weights themselves. `key` None means no
    dropout. Of packed documents each is read as if it were alone, and a token counts as much as its
    weight says. For `z_loss` and `label_smoothing` see `cross_entropy`.
    """
    if mesh_here() is not None:  # devices send each other the smaller numbers
        model = cast(model, dtype)
    packed = windows if isinstance(windows, Packed) else Packed(windows)
    hidden, _ = model.hidden(packed.tokens[..., :-1], key=key, starts=packed.starts, dtype=dtype)
    targets, softcap = packed.tokens[..., 1:], model.config.logit_softcap
    weight, bias = model.head_weight, model.head_bias
    return cross_entropy(
        hidden, weight, targets, bias, softcap, packed.weights, z_loss, label_smoothing
    )
