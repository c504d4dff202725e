"""Direct attribution: what each part of a model adds to a logit by itself.

The residual stream is a sum, and the head reads it through the last norm. With the statistics of
the norms held as they are, a logit is therefore a sum of shares: of the embedding, of every head,
of every mlp, of the biases (Elhage et al. 2021, "A mathematical framework for transformer
circuits"; logit attribution in TransformerLens).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from eqx_gpt import inspect
from eqx_gpt.gpt import GPT, check_tokens
from eqx_gpt.layers.block import Block
from eqx_gpt.layers.norm import Norm
from eqx_gpt.lora import merge
from eqx_gpt.shapes import TokensLike


class Attribution(eqx.Module):
    """Shares in a logit, or in a difference of two; they sum to it, before any soft cap, as far
    as the dtype of the model's weights goes.

    `attention_bias` is of the biases of the output projections and of norms after attention;
    `bias` of the last norm and of the head. An mlp's own bias is in its share.
    """

    embedding: Float[Array, "*batch"]
    position: Float[Array, "*batch"]
    heads: Float[Array, "layer head *batch"]
    attention_bias: Float[Array, "layer *batch"]
    mlp: Float[Array, "layer *batch"]
    bias: Float[Array, "*batch"]

    @property
    def total(self) -> Float[Array, "*batch"]:
        """The logit itself."""
        layers = jnp.sum(self.heads, axis=(0, 1)) + jnp.sum(self.attention_bias + self.mlp, axis=0)
        return self.embedding + self.position + layers + self.bias


def attribute(
    model: GPT,
    tokens: TokensLike,
    target: TokensLike,
    *,
    minus: TokensLike | None = None,
    position: int = -1,
) -> Attribution:
    """Each part's share in the logit of `target` at one position of every sequence.

    **Arguments:**

    - `tokens`: `(*batch, seq)`, as for `GPT.__call__`.
    - `target`: token ids of shape `(*batch,)`.
    - `minus`: token ids likewise: shares in logit(target) - logit(minus).
    - `position`: whose logits, from the end if negative.

    **Raises:** as `GPT.__call__`; ValueError for a model laid out by `for_inference`, for ids whose
    shape is not the batch's, or for a position outside the sequence.
    """
    if not isinstance(model.blocks, Block):
        raise ValueError("this model is laid out for inference; give the original")
    *batch, seq = check_tokens(tokens, model.config).shape
    batch, model = tuple(batch), merge(model)
    blocks = model.blocks
    assert isinstance(blocks, Block)
    if not -seq <= position < seq:
        raise ValueError(f"position {position} lies outside a sequence of {seq} tokens")
    learned = model.wpe is not None
    per_layer = ("blocks.*.attention.heads", "blocks.*.mlp.output")
    stream = f"blocks.{model.config.n_layer - 1}.output"
    names = ("embedding", *per_layer, stream, *(("positions",) if learned else ()))
    _, seen = inspect.run(model, tokens, capture=names)
    at = {
        name: lax.index_in_dim(x, position % seq, axis=x.ndim - 2, keepdims=False)
        for name, x in seen.items()
        if name != "blocks.*.attention.heads"
    }
    heads = seen["blocks.*.attention.heads"]
    heads = lax.index_in_dim(heads, position % seq, axis=heads.ndim - 3, keepdims=False)

    # The direction in the stream that the logit reads, as seen through the last norm.
    direction, bias = _row(model, target, batch)
    if minus is not None:
        row, bias_minus = _row(model, minus, batch)
        direction, bias = direction - row, bias - bias_minus
    direction, bias_norm = _before(model.norm, at[stream].astype(jnp.float32), direction)

    def of_layer(_: None, layer: tuple[Block, Array]) -> tuple[None, tuple[Array, Array]]:
        block, heads = layer
        out, heads = block.attention.out, heads.astype(jnp.float32)
        assert isinstance(out.weight, jax.Array)
        weight = out.weight.astype(jnp.float32)
        biases = jnp.zeros_like(weight[:, 0]) if out.bias is None else out.bias.astype(jnp.float32)
        along, share_bias = direction, jnp.zeros(batch, jnp.float32)
        if block.post_norm1 is not None:
            attended = heads.reshape(*batch, -1) @ weight.T
            attended = attended + jnp.broadcast_to(biases, attended.shape)
            along, share_bias = _before(block.post_norm1, attended, direction)
        read = (along @ weight).reshape(heads.shape)  # what of each head's output counts
        shares = jnp.sum(heads * read, axis=-1)
        return None, (jnp.moveaxis(shares, -1, 0), share_bias + along @ biases)

    _, (of_heads, of_attention_bias) = lax.scan(of_layer, None, (blocks, heads))
    zero = jnp.zeros(batch, jnp.float32)
    return Attribution(
        embedding=_dot(at["embedding"], direction),
        position=_dot(at["positions"], direction) if learned else zero,
        heads=of_heads,
        attention_bias=of_attention_bias,
        mlp=_dot(at["blocks.*.mlp.output"], direction),
        bias=bias + bias_norm,
    )


def _row(model: GPT, ids: TokensLike, batch: tuple[int, ...]) -> tuple[Array, Array]:
    """The rows of the head for these tokens, and their biases."""
    if np.shape(ids) != batch:
        raise ValueError(f"token ids have shape {np.shape(ids)}, expected one a sequence: {batch}")
    ids = check_tokens(jnp.asarray(ids)[..., None], model.config)[..., 0]
    assert isinstance(model.head_weight, jax.Array)
    bias = jnp.zeros(batch, jnp.float32) if model.head_bias is None else model.head_bias[ids]
    return model.head_weight[ids].astype(jnp.float32), bias.astype(jnp.float32)


def _before(norm: Norm, x: Array, direction: Array) -> tuple[Array, Array]:
    """What `direction` after a norm is before it, its statistics held as those of `x`; and the
    share of the norm's bias."""
    scale = direction
    if norm.weight is not None:
        weight = norm.weight.astype(jnp.float32)
        weight = 1 + weight if norm.config.scale == "one_plus_weight" else weight
        scale = direction * jnp.broadcast_to(weight, direction.shape)
    centred = norm.config.kind == "layernorm"
    mean = jnp.mean(x, axis=-1, keepdims=True) if centred else jnp.zeros_like(x[..., :1])
    size = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True) + norm.config.eps
    before = scale * lax.rsqrt(size)
    if centred:
        before = before - jnp.mean(before, axis=-1, keepdims=True)
    bias = jnp.zeros(direction.shape[:-1], jnp.float32)
    if norm.bias is not None:
        bias = direction @ norm.bias.astype(jnp.float32)
    return before, bias


def _dot(x: Float[Array, "*rest d_model"], direction: Float[Array, "*batch d_model"]) -> Array:
    """Over the last axis; `x` may have a layer axis or lack the batch."""
    batch = jnp.broadcast_shapes(x.shape, direction.shape)
    both = jnp.broadcast_to(x.astype(jnp.float32), batch) * jnp.broadcast_to(direction, batch)
    return jnp.sum(both, axis=-1)
