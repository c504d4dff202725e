"""A model as a tree: the names, roles, number and dtype of its leaves."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from eqx_gpt.layers.linear import Embedding, Linear
from eqx_gpt.layers.norm import Norm
from eqx_gpt.ops.int8 import Int8

Role = Literal["weight", "bias", "lora", "norm", "embedding"]


def count_params(model: PyTree) -> int:
    """Trainable numbers in a model; a tied head counts once, a quantised weight in full."""
    leaves = jax.tree.leaves(model, is_leaf=_is_weight)
    return sum(leaf.size for leaf in leaves if isinstance(leaf, Int8) or _is_float(leaf))


def named_arrays(tree: PyTree) -> dict[str, Any]:
    """Every array of a tree by its dotted path, such as `blocks.attention.qkv.weight`.

    Abstract arrays (of `eqx.filter_eval_shape`) count as arrays.
    """
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name_of(path): leaf for path, leaf in paths_and_leaves if _is_array(leaf)}


def named_weights(tree: PyTree) -> dict[str, Any]:
    """As `named_arrays`, with a quantised weight as one."""
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_weight)
    return {name_of(path): x for path, x in paths_and_leaves if isinstance(x, Int8) or _is_array(x)}


def name_of(path: tuple[Any, ...]) -> str:
    """The dotted name of a path as jax gives it."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def matching(names: Iterable[str], patterns: str) -> list[str]:
    """Those of the names that one of the patterns fits: shell patterns (`*`, `?`, `[ab]`), apart
    by commas. ValueError, which lists the names, for a pattern that fits none."""
    names, found = list(names), set[str]()
    for pattern in patterns.split(","):
        fitting = fnmatch.filter(names, pattern.strip())
        if not fitting:
            raise ValueError(f"no name fits {pattern.strip()!r}; there are {', '.join(names)}")
        found.update(fitting)
    return [name for name in names if name in found]


def with_arrays(tree: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """The tree with the arrays of `named_arrays` replaced, by quantised weights too.

    KeyError if a name is missing or is not the tree's, ValueError if a shape differs.
    """
    for name in arrays.keys() - named_arrays(tree).keys():
        raise KeyError(name)

    def replaced(path: tuple[Any, ...], leaf: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        name = name_of(path)
        if arrays[name].shape != leaf.shape:
            raise ValueError(f"{name}: expected shape {leaf.shape}, got {arrays[name].shape}")
        return arrays[name]

    return jax.tree_util.tree_map_with_path(replaced, tree)


def roles(model: PyTree) -> PyTree:
    """The role of every leaf, as a tree of the model's structure; a quantised weight is one leaf.

    What treats leaves differently (decay, casts, sharding) asks for the role and never for
    `ndim`: in the stacked blocks biases and norms have two dimensions.
    """

    def of_module(module: Any) -> PyTree:
        if isinstance(module, Linear):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: path[0].name, module, is_leaf=_is_weight
            )
        role = "norm" if isinstance(module, Norm) else "embedding"
        return jax.tree.map(lambda _: role, module, is_leaf=_is_weight)

    return jax.tree.map(
        of_module, model, is_leaf=lambda x: isinstance(x, Linear | Embedding | Norm)
    )


def map_with_roles(fn: Callable[[Role, Any], Any], model: PyTree) -> PyTree:
    return jax.tree.map(fn, roles(model), model)


def cast(model: PyTree, dtype: Any) -> PyTree:
    """The model with weights, biases and embeddings in `dtype`, which it then computes in.

    Norms keep their dtype: near 1, bfloat16 has no room for what a scale learns, and they cost
    nothing.
    """
    return map_with_roles(lambda role, x: x if role == "norm" else x.astype(dtype), model)


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Int8)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _is_float(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
