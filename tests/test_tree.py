"""A model as a tree: names, roles, casts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, lively

from eqx_gpt import GPT, cast, count_params
from eqx_gpt.layers.linear import Linear
from eqx_gpt.tree import named_arrays, roles, with_arrays

# Dotted path -> (shape, role), written out for the two architectures that differ most.
EXPECTED = {
    "gpt2": {
        "wte.weight": ((31, 21), "embedding"),
        "wpe.weight": ((13, 21), "embedding"),
        "blocks.norm1.weight": ((2, 21), "norm"),
        "blocks.norm1.bias": ((2, 21), "norm"),
        "blocks.attention.qkv.weight": ((2, 63, 21), "weight"),
        "blocks.attention.qkv.bias": ((2, 63), "bias"),
        "blocks.attention.out.weight": ((2, 21, 21), "weight"),
        "blocks.attention.out.bias": ((2, 21), "bias"),
        "blocks.norm2.weight": ((2, 21), "norm"),
        "blocks.norm2.bias": ((2, 21), "norm"),
        "blocks.mlp.up.weight": ((2, 84, 21), "weight"),
        "blocks.mlp.up.bias": ((2, 84), "bias"),
        "blocks.mlp.down.weight": ((2, 21, 84), "weight"),
        "blocks.mlp.down.bias": ((2, 21), "bias"),
        "norm.weight": ((21,), "norm"),
        "norm.bias": ((21,), "norm"),
    },
    "llama": {
        "wte.weight": ((41, 23), "embedding"),
        "blocks.norm1.weight": ((2, 23), "norm"),
        "blocks.attention.qkv.weight": ((2, 100, 23), "weight"),
        "blocks.attention.out.weight": ((2, 23, 60), "weight"),
        "blocks.norm2.weight": ((2, 23), "norm"),
        "blocks.mlp.up.weight": ((2, 19, 23), "weight"),
        "blocks.mlp.gate.weight": ((2, 19, 23), "weight"),
        "blocks.mlp.down.weight": ((2, 23, 19), "weight"),
        "norm.weight": ((23,), "norm"),
        "head.weight": ((41, 23), "weight"),
    },
}


@pytest.fixture(params=EXPECTED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_names_shapes_and_roles(name: str) -> None:
    """In a stack, biases and norm scales have two dimensions, as a matrix has outside of it."""
    model = lively(ARCHITECTURES[name])
    found_roles = dict(zip(named_arrays(model), jax.tree.leaves(roles(model)), strict=True))
    found = {path: (x.shape, found_roles[path]) for path, x in named_arrays(model).items()}
    assert found == EXPECTED[name]


def test_roles_of_a_bare_linear_with_one_array_twice() -> None:
    square = jnp.ones((3, 3), jnp.float32)
    assert jax.tree.leaves(roles(Linear(square, square[0]))) == ["weight", "bias"]


def test_count(name: str) -> None:
    expected = sum(int(np.prod(shape)) for shape, _ in EXPECTED[name].values())
    assert count_params(lively(ARCHITECTURES[name])) == expected


def test_with_arrays_replaces_all() -> None:
    model = lively(ARCHITECTURES["gpt2"])
    doubled = {path: 2 * x for path, x in named_arrays(model).items()}
    found = named_arrays(with_arrays(model, doubled))
    assert list(found) == list(doubled)
    assert all(found[path] is doubled[path] for path in doubled)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda arrays: arrays.pop("norm.bias"), KeyError, r"norm\.bias"),
        (
            lambda arrays: arrays.update({"head.weight": arrays["wte.weight"]}),
            KeyError,
            r"head\.weight",
        ),
        (
            lambda arrays: arrays.update({"wpe.weight": arrays["wte.weight"]}),
            ValueError,
            r"wpe\.weight: expected shape \(13, 21\), got \(31, 21\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_with_arrays_refuses(change: object, error: type[Exception], message: str) -> None:
    model = lively(ARCHITECTURES["gpt2"])
    arrays = named_arrays(model)
    change(arrays)
    with pytest.raises(error, match=message):
        with_arrays(model, arrays)


def test_cast_keeps_norms(name: str) -> None:
    model = lively(ARCHITECTURES[name])
    low: GPT = cast(model, jnp.bfloat16)
    for path, x in named_arrays(low).items():
        dtype = jnp.float32 if EXPECTED[name][path][1] == "norm" else jnp.bfloat16
        assert x.dtype == dtype, path
        assert np.array_equal(x, named_arrays(model)[path].astype(dtype)), path
    assert low.config == model.config
    assert count_params(low) == count_params(model)
