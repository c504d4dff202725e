"""Low-rank adapters of a model's linear maps (LoRA, Hu et al. 2021, arXiv:2106.09685).

An adapted model is a `GPT` like any other, some of whose `Linear`s hold a `LowRank`: it computes,
generates and is sharded as before. Only maps of the blocks are adapted, never embeddings or the
head.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from eqx_gpt.config import LoRAConfig
from eqx_gpt.layers.linear import Linear, LowRank
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.shapes import PRNGKey
from eqx_gpt.tree import map_with_roles, matching, name_of

Model = TypeVar("Model")


def init(model: Model, config: LoRAConfig, *, key: PRNGKey) -> Model:
    """The model with new adapters, which change nothing yet.

    **Raises:** ValueError if a pattern of `config.targets` fits no map, with the names of those
    there are; if the model has adapters already, or is laid out for decoding.
    """
    if adapters(model):
        raise ValueError("this model has adapters already; merge or detach them first")
    maps = targets(model)
    if any(len(linear.weight.shape) != 3 for linear in maps.values()):
        raise ValueError("this model is laid out for decoding; adapt the one it was made from")
    try:
        chosen = matching(maps, config.targets)
    except ValueError as error:
        raise ValueError(f"targets of low-rank adapters: {error}") from None
    new = {}
    for name, map_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        n_layer, n_out, n_in = maps[name].weight.shape

        def of_layer(key: PRNGKey, n_in: int = n_in, n_out: int = n_out) -> LowRank:
            return LowRank.init(n_in, n_out, rank=config.rank, scale=config.scale, key=key)

        new[name] = eqx.filter_vmap(of_layer)(jax.random.split(map_key, n_layer))
    return attach(model, new)


def targets(model: PyTree) -> dict[str, Linear]:
    """The maps that can be adapted, by name, such as `blocks.attention.qkv`."""
    found = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_linear)[0]
    linears = {name_of(path): x for path, x in found if isinstance(x, Linear)}
    return {name: linear for name, linear in linears.items() if name.startswith("blocks.")}


def adapters(model: PyTree) -> dict[str, LowRank]:
    """The adapters in a model, by the names of their maps."""
    maps = targets(model).items()
    return {name: linear.lora for name, linear in maps if linear.lora is not None}


def attach(model: Model, adapters: Mapping[str, LowRank]) -> Model:
    """The model with these adapters, by the names of their maps, and no others."""
    unknown = adapters.keys() - targets(model).keys()
    if unknown:
        raise KeyError(sorted(unknown)[0])
    return _map_linears(lambda name, linear: _with_lora(linear, adapters.get(name)), model)


def detach(model: Model) -> Model:
    """The model without its adapters."""
    return attach(model, {})


def merge(model: Model) -> Model:
    """The model with its adapters added into its weights, weight + scale * b @ a.

    Summed in float32 and rounded to the dtype of the weight. ValueError if a weight is quantised.
    """
    return _merged(model) if adapters(model) else model


def trainable(model: PyTree) -> PyTree:
    """True for the leaves of adapters, False for all others: a filter for `eqx.partition`."""
    return map_with_roles(lambda role, _: role == "lora", model)


@eqx.filter_jit
def _merged(model: Model) -> Model:
    return _map_linears(lambda _, linear: _merged_linear(linear), model)


def _merged_linear(linear: Linear) -> Linear:
    weight, lora = linear.weight, linear.lora
    if lora is None:
        return linear
    if isinstance(weight, Int8):
        raise ValueError("a quantised weight cannot take an adapter in; merge, then quantise")
    a, b = lora.a.astype(jnp.float32), lora.b.astype(jnp.float32)
    change = lora.scale * jnp.matmul(b, a, precision=lax.Precision.HIGHEST)
    merged = (weight.astype(jnp.float32) + change).astype(weight.dtype)
    return eqx.tree_at(lambda x: x.weight, _with_lora(linear, None), merged)


def _with_lora(linear: Linear, lora: LowRank | None) -> Linear:
    return eqx.tree_at(lambda x: x.lora, linear, lora, is_leaf=lambda x: x is None)


def _map_linears(fn: Callable[[str, Linear], Linear], model: Model) -> Model:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: fn(name_of(path), x) if isinstance(x, Linear) else x,
        model,
        is_leaf=_is_linear,
    )


def _is_linear(x: object) -> bool:
    return isinstance(x, Linear)
