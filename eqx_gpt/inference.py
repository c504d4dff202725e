"""Models as decoding wants them: smaller numbers, and a layer's weights apart from the others'."""

import equinox as eqx
import jax
import jax.numpy as jnp

from eqx_gpt.gpt import GPT
from eqx_gpt.layers.linear import Embedding, Linear
from eqx_gpt.lora import merge
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.tree import cast


def for_inference(model: GPT, quantize: str | None = None) -> GPT:
    """The model with its weights in bfloat16, laid out for decoding.

    Decoding one sequence takes as long as reading the weights does. `quantize="int8"` halves that
    again: whatever the model multiplies by (the linear maps of the blocks, the head, tied or not)
    becomes eight-bit integers with one scale an output (`Int8`). Biases, norms and tables that are
    only looked up stay. SmolLM2-135M (its four-bit file) on 20,480 tokens of Shakespeare: the
    perplexity rises from 45.25 to 45.53, and 94.7 % of the likeliest tokens stay the same.

    Adapters are merged. Not for training, and not for saving: every layer is a block of its own,
    so that no program has to copy its weights out of the stack.

    **Raises:** ValueError for an unknown `quantize`, or if the model is laid out already.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize must be None or 'int8', got {quantize!r}")
    if isinstance(model.blocks, tuple):
        raise ValueError("this model is laid out for inference already; give the original")
    return _converted(model, quantize == "int8")


def lay_out(model: GPT) -> GPT:
    """The same numbers with every layer as a block of its own, if it is not so already.

    A program that reads a layer of the stack copies it first, each time that it is called.
    """
    return model if isinstance(model.blocks, tuple) else _unstacked(model)


@eqx.filter_jit
def _unstacked(model: GPT) -> GPT:
    return model.unstacked()


@eqx.filter_jit
def _converted(model: GPT, int8: bool) -> GPT:
    model = merge(model).unstacked()
    if int8:  # from the exact weights: bfloat16 would round them once more
        model = jax.tree.map(
            lambda x: _quantized(x) if isinstance(x, Linear) else x,
            model,
            is_leaf=lambda x: isinstance(x, Linear),
        )
        if model.head is None:
            model = eqx.tree_at(lambda m: m.wte, model, _quantized(model.wte))
    return cast(model, jnp.bfloat16)


def _quantized(module: Linear | Embedding) -> Linear | Embedding:
    assert not isinstance(module.weight, Int8)
    return eqx.tree_at(lambda m: m.weight, module, Int8.quantize(module.weight))
