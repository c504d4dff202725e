"""Looking inside: any activation of any model captured, patched or ablated, by its name.

    logits, seen = inspect.run(model, tokens, capture=["blocks.*.attention.weights"])
    logits, _ = inspect.run(model, tokens, edits={"blocks.3.mlp.output": lambda x, layer: 0 * x})

`eqx_gpt/tap.py` has the names and what they stand for; `names(model)` lists a model's. In the
spirit of TransformerLens (Nanda & Bloom 2022).
"""

from collections.abc import Iterable, Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eqx_gpt import lora
from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT, check_tokens
from eqx_gpt.layers.block import Block
from eqx_gpt.shapes import Hidden, Logits, TokensLike
from eqx_gpt.tap import BLOCK_SITES, MODEL_SITES, Edit, Taps


def run(
    model: GPT,
    tokens: TokensLike,
    *,
    capture: str | Sequence[str] = (),
    edits: Mapping[str, Edit] | None = None,
    starts: Int[Array, "*batch seq"] | None = None,
) -> tuple[Logits, dict[str, Array]]:
    """The logits of `model(tokens)`, with activations captured and changed on the way.

    A name is `logits`, `norm`, `embedding`, `positions`, or that of a block: `blocks.3.output` of
    the fourth, `blocks.*.output` of all. Works under `eqx.filter_jit`, `jax.grad` and `jax.vmap`
    like the model; layers of whom nothing is asked run as they do in `model(tokens)`.

    **Arguments:**

    - `tokens`, `starts`: as for `GPT.__call__`.
    - `capture`: names of activations, which are shown after their edits.
    - `edits`: by name, an array to take the activation's place, or a function
      `(value, layer) -> value`. `layer` is the block's number, an int32 scalar which may be traced
      (None outside the blocks). For `blocks.*` an array has a leading layer axis. The edit of
      `blocks.*` comes before that of a single block.

    **Returns:** the logits, and what was captured by name, `blocks.*` with a leading layer axis.
    Attention computes scores and weights of all pairs only where they are asked for. A head whose
    weights no edit changes keeps its output bit for bit.

    **Raises:** as `GPT.__call__`; ValueError for an unknown name or an edit of the wrong shape.
    """
    captures = (capture,) if isinstance(capture, str) else tuple(capture)
    edits = edits or {}
    if model.wpe is None and "positions" in (*captures, *edits):
        raise ValueError("no activation 'positions': this model has no table of positions")
    for name, edit in edits.items():
        if isinstance(edit, ReplaceHeads):
            edit.check(name, model.config.n_layer)
    taps = Taps.init(captures, edits, model.config.n_layer)
    hidden, _ = model.hidden(check_tokens(tokens, model.config), taps=taps, starts=starts)
    logits = taps.outside("logits", model.unembed(hidden))
    return logits, taps.seen(captures)


def names(model: GPT) -> dict[str, str]:
    """Every name that `run` knows for this model, and what it stands for."""
    outside = {
        name: meaning
        for name, meaning in MODEL_SITES.items()
        if name != "positions" or model.wpe is not None
    }
    return outside | {f"blocks.*.{site}": meaning for site, meaning in BLOCK_SITES.items()}


def logit_lens(model: GPT, stream: Hidden) -> Logits:
    """The logits if the residual stream went to the last norm and the head from here
    (nostalgebraist 2020): of `blocks.*.output` for every layer, of `blocks.0.input` before them."""
    return model.unembed(model.norm(stream))


def head_mask(
    config: GPTConfig, heads: Iterable[tuple[int, int]]
) -> Bool[np.ndarray, "layer head"]:
    """True for the (layer, head) pairs named. IndexError for one that is not there."""
    mask = np.zeros((config.n_layer, config.n_head), bool)
    for layer, head in heads:
        if not (0 <= layer < config.n_layer and 0 <= head < config.n_head):
            raise IndexError(
                f"no head {head} in layer {layer}: the model has layers 0 to "
                f"{config.n_layer - 1} of heads 0 to {config.n_head - 1}"
            )
        mask[layer, head] = True
    return mask


def head_outputs(
    model: GPT, heads: Float[Array, "layer *batch seq head head_dim"]
) -> Float[Array, "layer *batch seq head d_model"]:
    """What each head by itself writes to the stream, of the captured `blocks.*.attention.heads`:
    without the bias of the output projection, before a norm that follows attention."""
    if isinstance(model.blocks, tuple):
        raise ValueError("this model is laid out for inference; give the original")
    blocks = lora.merge(model).blocks
    assert isinstance(blocks, Block)
    weight = blocks.attention.out.weight
    assert isinstance(weight, jax.Array)
    by_head = weight.reshape(*weight.shape[:-1], *heads.shape[-2:])
    return jnp.einsum("l...sha,lmha->l...shm", heads, by_head)


class ReplaceHeads(eqx.Module):
    """An edit for `blocks.*.attention.heads`: zeros, or `by`, in place of the heads in `mask`.

    `by` broadcasts against the captured `blocks.*.attention.heads` behind its layer axis: the
    whole of another run's, or means of shape `(layer, head, head_dim)`. Its arrays may be traced,
    so that one program sweeps over all heads.
    """

    mask: Bool[Array | np.ndarray, "layer head"]
    by: Float[Array | np.ndarray, "layer *rest head head_dim"] | None = None

    def check(self, name: str, n_layer: int) -> None:
        """ValueError if this is not for a model of so many layers."""
        for what, array in (("mask", self.mask), ("by", self.by)):
            if array is not None and jnp.shape(array)[:1] != (n_layer,):
                raise ValueError(
                    f"ReplaceHeads for {name!r}: {what} has shape {jnp.shape(array)}, expected "
                    f"({n_layer}, ...): one row a layer (see head_mask)"
                )

    def __call__(
        self, value: Float[Array, "*batch seq head head_dim"], layer: Int[Array, ""] | None
    ) -> Float[Array, "*batch seq head head_dim"]:
        new = jnp.zeros((), value.dtype)
        if self.by is not None:
            new = jnp.asarray(self.by)[layer].astype(value.dtype)
        if jnp.shape(self.mask)[1:] != value.shape[-2:-1]:
            raise ValueError(
                f"ReplaceHeads: mask has shape {jnp.shape(self.mask)} for {value.shape[-2]} heads"
            )
        mask = jnp.asarray(self.mask)[layer]
        broadcast = lambda x: jnp.broadcast_to(x, value.shape)  # noqa: E731
        return jnp.where(broadcast(mask[:, None]), broadcast(new), value)
