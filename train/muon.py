"""Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

The update of a matrix is its momentum with all singular values brought near 1, by a few
Newton-Schulz iterations. They are products of small matrices: so all matrices of one shape, of
all layers, go through them together.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from eqx_gpt.gpt import GPT
from eqx_gpt.ops.matmul import product, transposed
from eqx_gpt.ops.rounding import rounded, rounded_once
from eqx_gpt.tree import name_of

_ITERATIONS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # the author's: steepest at 0, singular values to 0.7 ... 1.2
_EPS = 1e-7


class MuonState(NamedTuple):
    momentum: PyTree


def scale_by_muon(
    beta: float = 0.95, *, dtype: DTypeLike = jnp.bfloat16
) -> optax.GradientTransformation:
    """Gradients of matrices `(*layer, out, in)` -> orthogonalised Nesterov momentum.

    A matrix of more rows than columns is multiplied by sqrt(out / in), so that activations change
    alike. Of the fused projection of a `GPT`, queries, keys and values are matrices of their own.
    `dtype` is that of the products.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, MuonState]:
        del params
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, updates)
        return orthogonalized(ahead, dtype), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def orthogonalized(matrices: PyTree, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Every leaf `(*layer, out, in)`, scaled as `scale_by_muon` says."""
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(matrices)
    cuts = _cuts(matrices)
    split = [
        jnp.split(leaf.reshape(-1, *leaf.shape[-2:]), cuts if "qkv" in name_of(path) else [], 1)
        for path, leaf in paths_and_leaves
    ]
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, parts in enumerate(split):
        for j, part in enumerate(parts):
            n_out, n_in = part.shape[1:]
            groups.setdefault((min(n_out, n_in), max(n_out, n_in)), []).append((i, j))
    for members in groups.values():
        wide = [_wide(split[i][j]) for i, j in members]
        together = newton_schulz(jnp.concatenate(wide), dtype)
        ends = list(itertools.accumulate(len(part) for part in wide))
        for (i, j), part in zip(members, jnp.split(together, ends[:-1]), strict=True):
            split[i][j] = _scaled_as(split[i][j], part)
    leaves = [
        jnp.concatenate(parts, 1).reshape(leaf.shape)
        for parts, (_, leaf) in zip(split, paths_and_leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def newton_schulz(
    x: Float[Array, "layer m n"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "layer m n"]:
    """U S Vᵀ -> about U Vᵀ, for m <= n: x -> a x + b (x xᵀ) x + c (x xᵀ)² x, five times."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = rounded_once(x / jnp.broadcast_to(jnp.maximum(norm, _EPS), x.shape), dtype)
    for _ in range(_ITERATIONS):
        gram = product(x, transposed(x)).astype(dtype)
        polynomial = _B * gram.astype(jnp.float32) + _C * product(gram, gram)
        y = product(rounded(polynomial, dtype), x)
        x = rounded_once(_A * x.astype(jnp.float32) + y, dtype)
    return x.astype(jnp.float32)


def _cuts(tree: PyTree) -> list[int]:
    """Where keys and values begin among the rows of a model's fused projection."""
    if not isinstance(tree, GPT):
        return []
    config = tree.config
    keys = config.n_head * config.head_dim
    return [keys, keys + config.n_kv_head * config.head_dim]


def _wide(x: Float[Array, "layer out in"]) -> Float[Array, "layer m n"]:
    return jnp.swapaxes(x, 1, 2) if x.shape[1] > x.shape[2] else x


def _scaled_as(
    given: Float[Array, "layer out in"], wide: Float[Array, "layer m n"]
) -> Float[Array, "layer out in"]:
    n_out, n_in = given.shape[1:]
    return jnp.swapaxes(wide, 1, 2) * math.sqrt(n_out / n_in) if n_out > n_in else wide
