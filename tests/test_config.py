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
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    MLPConfig,
    NormConfig,
    PositionConfig,
    YarnScaling,
    get_config,
)

YARN = YarnScaling(factor=4.0, original_block_size=32)
LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (NormConfig, {"kind": "batch"}, "NormConfig: kind .* 'layernorm', 'rmsnorm', got 'batch'"),
        (NormConfig, {"kind": "rmsnorm"}, "an rmsnorm has no bias; set bias=False"),
        (NormConfig, {"eps": 0.0}, "eps must be a number above 0, got 0.0"),
        (NormConfig, {"eps": float("nan")}, "eps must be a number above 0, got nan"),
        (
            PositionConfig,
            {"kind": "alibi"},
            "kind must be one of 'learned', 'rope', 'none', got 'alibi'",
        ),
        (PositionConfig, {"rope_theta": 5e5}, "rope_theta=500000.0 needs kind='rope'"),
        (NormConfig, {"scale": "two"}, "scale must be one of .*'none', got 'two'"),
        (NormConfig, {"scale": "none"}, "scale='none' learns nothing; set bias=False"),
        (PositionConfig, {"rope_dim": 4}, "rope_dim=4 needs kind='rope'"),
        (PositionConfig, {"rope_scaling": YARN}, "rope_scaling=.* needs kind='rope'"),
        (PositionConfig, {"rope_pairs": "odd"}, "rope_pairs must be one of .* got 'odd'"),
        (PositionConfig, {"kind": "rope", "offset": 2}, "offset=2 needs kind='learned'"),
        (PositionConfig, {"kind": "rope", "rope_dim": 0}, "rope_dim must be a whole number above"),
        (PositionConfig, {"kind": "rope", "rope_theta": -1.0}, "rope_theta must be a number above"),
        (PositionConfig, {"offset": -1}, "offset must be 0 or above, got -1"),
        (LinearScaling(2.0), {"factor": 0.0}, "LinearScaling: factor must be a number above 0"),
        (LLAMA3, {"high_freq_factor": 1.0}, "high_freq_factor=1.0 must exceed low_freq_factor=1.0"),
        (LLAMA3, {"original_block_size": 0}, "original_block_size must be a whole number above 0"),
        (YARN, {"beta_fast": 1.0}, "beta_fast=1.0 must exceed beta_slow=1.0"),
        (YARN, {"attention_factor": 0.0}, "attention_factor must be a number above 0, got 0.0"),
        (AttentionConfig, {"qk_norm": "l2"}, "qk_norm must be one of .* got 'l2'"),
        (AttentionConfig, {"softcap": 0.0}, "softcap must be a number above 0, got 0.0"),
        (AttentionConfig, {"scale": float("inf")}, "scale must be a number above 0, got inf"),
        (LayerConfig, {"window": 0}, "LayerConfig: window must be a whole number above 0, got 0"),
        (LayerConfig, {"position": PositionConfig()}, "a learned table belongs to the whole model"),
        (GPTConfig, {"layers": ()}, "layers names 0 kinds for n_layer=12"),
        (GPTConfig, {"layers": (LayerConfig(),) * 13}, "layers names 13 kinds for n_layer=12"),
        (
            GPTConfig,
            {"layers": (LayerConfig(position=PositionConfig("rope", rope_dim=66)),)},
            "head_dim=64 dimensions of a head, not 66",
        ),
        (GPTConfig, {"residual": "post"}, "residual must be one of 'pre_norm', .* got 'post'"),
        (GPTConfig, {"head_bias": True}, "head_bias needs head='untied'"),
        (GPTConfig, {"embedding_scale": "two"}, "embedding_scale must be one of .* got 'two'"),
        (GPTConfig, {"logit_softcap": -1.0}, "logit_softcap must be a number above 0, got -1.0"),
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
            "head_dim=3 dimensions of a head, not 3; give an even rope_dim",
        ),
        (GPTConfig, {"n_token": 50258}, "n_token=50258 exceeds vocab_size=50257"),
        (GPTConfig, {"n_token": 0}, "got 0"),
        (GPTConfig, {"head": "shared"}, "head must be one of 'tied', 'untied', got 'shared'"),
        (GPTConfig, {"remat": "all"}, "remat must be one of 'none', 'block', 'dots', got 'all'"),
        (GPTConfig, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (GPTConfig, {"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\), got 1.0"),
        (GPTConfig, {"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        (GPTConfig, {"dropout": float("nan")}, r"dropout must be in \[0, 1\), got nan"),
    ],
)
def test_refused(cls: Any, fields: dict[str, Any], message: str) -> None:
    """A class stands for its defaults."""
    config = cls() if isinstance(cls, type) else dataclasses.replace(cls)
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
        ({"layers": {}}, "layers must be a list, got {}"),
        ({"layers": [{"size": 3}]}, "LayerConfig has no field 'size'"),
        ({"position": {"rope_scaling": {"factor": 2.0}}}, "unknown rope_scaling None; linear,"),
        ({"position": {"rope_scaling": "yarn"}}, "YarnScaling: expected an object .* 'yarn'"),
    ],
)
def test_refused_dictionary(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict(values)


def test_configs_are_values() -> None:
    assert hash(GPTConfig(n_layer=5)) == hash(GPTConfig(n_layer=5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layer = 5  # pyright: ignore[reportAttributeAccessIssue]


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
