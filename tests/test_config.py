"""Configurations: what is refused, and the way to JSON and back."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
from architectures import ARCHITECTURES

import eqx_gpt.config
from eqx_gpt import (
    AttentionConfig,
    GPTConfig,
    MLPConfig,
    NormConfig,
    PositionConfig,
    get_config,
    list_models,
)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (NormConfig, {"kind": "batch"}, "NormConfig: kind .* 'layernorm', 'rmsnorm', got 'batch'"),
        (NormConfig, {"kind": "rmsnorm"}, "an rmsnorm has no bias; set bias=False"),
        (NormConfig, {"eps": 0.0}, "eps must be positive, got 0.0"),
        (NormConfig, {"eps": float("nan")}, "eps must be positive, got nan"),
        (PositionConfig, {"kind": "alibi"}, "kind must be one of 'learned', 'rope', got 'alibi'"),
        (PositionConfig, {"rope_theta": 5e5}, "rope_theta=500000.0 needs kind='rope'"),
        (MLPConfig, {"kind": "moe"}, "MLPConfig: kind must be one of 'plain', 'gated', got 'moe'"),
        (MLPConfig, {"activation": "tanh"}, "activation must be one of .*'silu', got 'tanh'"),
        (GPTConfig, {"block_size": 0}, "block_size must be a whole number above 0, got 0"),
        (GPTConfig, {"vocab_size": -1}, "vocab_size must be a whole number above 0, got -1"),
        (GPTConfig, {"n_layer": 2.0}, "n_layer must be a whole number above 0, got 2.0"),
        (GPTConfig, {"n_head": True}, "n_head must be a whole number above 0, got True"),
        (GPTConfig, {"n_embd": "768"}, "n_embd must be a whole number above 0, got '768'"),
        (GPTConfig, {"unroll": 0}, "unroll must be a whole number above 0, got 0"),
        (GPTConfig, {"n_embd": 770}, "n_embd=770 is not a multiple of n_head=12; .*head_dim"),
        (
            GPTConfig,
            {"attention": AttentionConfig(n_kv_head=5)},
            "n_head=12 is not a multiple of attention.n_kv_head=5",
        ),
        (GPTConfig, {"attention": AttentionConfig(n_kv_head=0)}, "n_kv_head must be .* got 0"),
        (GPTConfig, {"attention": AttentionConfig(head_dim=0)}, "head_dim must be .* got 0"),
        (GPTConfig, {"mlp": MLPConfig(n_inner=0)}, "n_inner must be a whole .* got 0"),
        (
            GPTConfig,
            {"n_embd": 36, "position": PositionConfig("rope")},
            "rope needs an even head_dim, got 3",
        ),
        (GPTConfig, {"n_token": 50258}, "n_token=50258 exceeds vocab_size=50257"),
        (GPTConfig, {"n_token": 0}, "got 0"),
        (GPTConfig, {"head": "shared"}, "head must be one of 'tied', 'untied', got 'shared'"),
        (GPTConfig, {"remat": "all"}, "remat must be one of 'none', 'block', got 'all'"),
        (GPTConfig, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (GPTConfig, {"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        (GPTConfig, {"dropout": float("nan")}, r"dropout must be in \[0, 1\), got nan"),
    ],
)
def test_refused(cls: type, fields: dict[str, Any], message: str) -> None:
    config = cls()
    for name, value in fields.items():  # past the tests' own check of annotations
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


def test_defaults_are_gpt2s() -> None:
    config = GPTConfig()
    assert (config.n_kv_head, config.head_dim, config.n_inner) == (12, 64, 3072)
    assert config.real_vocab_size == config.vocab_size == 50257
    assert config == get_config("gpt2")


def test_given_sizes_win_over_derived_ones() -> None:
    config = ARCHITECTURES["llama"]
    assert (config.n_kv_head, config.head_dim, config.n_inner) == (2, 10, 19)
    assert ARCHITECTURES["no_bias"].real_vocab_size == 29


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_through_json(name: str) -> None:
    config = ARCHITECTURES[name]
    text = json.dumps(config.to_dict())
    assert GPTConfig.from_dict(json.loads(text)) == config


def test_partial_dictionary_keeps_the_defaults() -> None:
    config = GPTConfig.from_dict({"n_layer": 5, "norm": {"eps": 1e-6}})
    assert config == GPTConfig(n_layer=5, norm=NormConfig(eps=1e-6))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 2}, "GPTConfig has no field 'n_layers'; did you mean 'n_layer'"),
        ({"mlp": {"activaton": "relu"}}, "MLPConfig has no field 'activaton'; .*'activation'"),
        ({"zzz": 1}, "GPTConfig has no field 'zzz'; known: block_size, vocab_size, n_layer"),
        ({"norm": "rmsnorm"}, "NormConfig: expected an object of fields, got 'rmsnorm'"),
        ({"norm": {"kind": "rmsnorm"}}, "an rmsnorm has no bias"),
    ],
)
def test_refused_dictionary(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict(values)


def test_configs_are_values() -> None:
    assert hash(GPTConfig(n_layer=5)) == hash(GPTConfig(n_layer=5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layer = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_zoo() -> None:
    assert {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"} <= set(list_models())
    for name in list_models():
        assert isinstance(get_config(name), GPTConfig)


def test_unknown_model_names_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'gpt2-xxl'; did you mean .*'gpt2-xl'"):
        get_config("gpt2-xxl")
    with pytest.raises(ValueError, match="unknown model 'zzz'; known: gpt2, gpt2-medium"):
        get_config("zzz")


def test_config_needs_no_jax() -> None:
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({eqx_gpt.config.__file__!r})\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
