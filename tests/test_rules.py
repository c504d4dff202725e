"""The key rules and the reading of config.json."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

import eqx_gpt
from eqx_gpt.config import AttentionConfig, GPTConfig, MLPConfig, NormConfig, PositionConfig
from eqx_gpt.tree import named_arrays
from weights.errors import WeightsError
from weights.families import FAMILIES, family_for, family_of
from weights.families.gpt2 import GPT2
from weights.families.llama import LLAMA
from weights.family import closest, from_hf, to_hf
from weights.load import skeleton
from weights.rules import Rule, key_shapes, linear, tensor_shape

LLAMA_CONFIG = GPTConfig(
    block_size=31,
    vocab_size=71,
    n_layer=3,
    n_head=6,
    n_embd=12,
    head="untied",
    norm=NormConfig("rmsnorm", bias=False),
    position=PositionConfig("rope", rope_theta=500_000.0),
    attention=AttentionConfig(n_kv_head=2, head_dim=4, qkv_bias=False, out_bias=False),
    mlp=MLPConfig("gated", "silu", 37, bias=False),
)
CONFIGS = {
    "gpt2": GPTConfig(block_size=13, vocab_size=71, n_layer=3, n_head=5, n_embd=10),
    "gpt2, untied": GPTConfig(
        block_size=13, vocab_size=71, n_layer=2, n_head=5, n_embd=10, head="untied"
    ),
    "llama": LLAMA_CONFIG,
}

# openai-community/gpt2 as published
PUBLISHED_GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_of_a_model_has_one_place_in_the_file(name: str) -> None:
    config = CONFIGS[name]
    family, held = family_for(config)
    leaves = named_arrays(skeleton(held, "float32"))
    rules = family.key_map(held).all_rules(held.head)
    assert sorted(rule.leaf for rule in rules) == sorted(leaves)
    keys: list[str] = []
    for rule in rules:
        leaf = np.zeros(leaves[rule.leaf].shape, np.int32)
        for key, view in rule.views(leaf):
            keys.append(key)
            view += 1
        assert (leaf == 1).all(), rule.leaf
    assert len(set(keys)) == len(keys)


def test_gpt2_has_its_published_tensors() -> None:
    config = eqx_gpt.get_config("gpt2")
    leaves = named_arrays(skeleton(config, "float32"))
    rules = GPT2.key_map(config).all_rules("tied")
    shapes = {k: s for rule in rules for k, s in key_shapes(rule, leaves[rule.leaf].shape).items()}
    assert len(shapes) == 148
    assert sum(math.prod(shape) for shape in shapes.values()) == 124_439_808
    assert shapes["transformer.h.11.attn.c_attn.weight"] == (768, 2304)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (3072, 768)
    assert shapes["transformer.wte.weight"] == (50257, 768)


def test_operations() -> None:
    leaf = np.arange(24).reshape(2, 4, 3)
    same = dict(Rule("x", ("h.{layer}.x",)).views(leaf))
    assert list(same) == ["h.0.x", "h.1.x"]
    assert np.array_equal(same["h.1.x"], leaf[1])
    transposed = dict(Rule("x", ("h.{layer}.x",), "transpose").views(leaf))
    assert np.array_equal(transposed["h.1.x"], leaf[1].T)
    fused = dict(Rule("x", ("{layer}.q", "{layer}.k"), "fuse", (3, 1)).views(leaf))
    assert np.array_equal(fused["1.q"], leaf[1, :3])
    assert np.array_equal(fused["1.k"], leaf[1, 3:])
    assert list(dict(Rule("x", ("x",)).views(leaf))) == ["x"]
    assert all(np.shares_memory(view, leaf) for view in (same | transposed | fused).values())


def test_interleave() -> None:
    """As GPT-NeoX's query_key_value: for each head its rows of q, then of k, then of v."""
    n_layer, n_head, head_dim, n_in = 2, 3, 5, 7
    random = np.random.default_rng(0)
    q, k, v = random.normal(size=(3, n_layer, n_head * head_dim, n_in))
    leaf = np.concatenate([q, k, v], axis=1)
    rule = Rule("x", ("h.{layer}.x",), "interleave", (3, n_head))
    views = dict(rule.views(leaf))
    for layer in range(n_layer):
        tensor = np.empty((3 * n_head * head_dim, n_in))
        for head in range(n_head):
            of_head = slice(head * head_dim, (head + 1) * head_dim)
            for i, part in enumerate((q, k, v)):
                start = (3 * head + i) * head_dim
                tensor[start : start + head_dim] = part[layer, of_head]
        view = views[f"h.{layer}.x"]
        assert np.shares_memory(view, leaf)
        assert np.array_equal(view.reshape(tensor_shape(rule, view)), tensor)
    assert key_shapes(rule, leaf.shape) == {"h.0.x": (45, 7), "h.1.x": (45, 7)}
    with pytest.raises(ValueError, match=r"\(3, 3\) heads for \(44, 7\)"):
        list(rule.views(leaf[:, :44]))


@pytest.mark.parametrize("n_axis", [1, 2])
@pytest.mark.parametrize(
    "rule",
    [
        Rule("x", ("{layer}.x",)),
        Rule("x", ("x",)),
        Rule("x", ("{layer}.x",), "transpose"),
        Rule("x", ("{layer}.q", "{layer}.k", "{layer}.v"), "fuse", (13, 7, 10)),
        Rule("x", ("{layer}.x",), "interleave", (3, 2)),
    ],
    ids=lambda rule: f"{rule.op} {rule.keys[0]}",
)
def test_any_box_of_a_leaf_is_read_from_where_its_views_lie(rule: Rule, n_axis: int) -> None:
    if rule.op == "transpose" and n_axis == 1:
        return  # only matrices are transposed
    shape = ((2,) if rule.stacked else ()) + (30, 11)[:n_axis]
    leaf = np.random.default_rng(0).normal(size=shape)
    tensors = {key: view.reshape(tensor_shape(rule, view)) for key, view in rule.views(leaf)}
    layers = [range(2), range(1, 2)] if rule.stacked else [None]
    rows = [range(30), range(1), range(4, 17), range(13, 20), range(29, 30)]
    columns = [range(11), range(3, 8)] if n_axis == 2 else [None]
    for box in itertools.product(layers, rows, columns):
        kept = [indices for indices in box if indices is not None]
        part = np.full([len(indices) for indices in kept], np.nan)
        for key, view, of_tensor in rule.reads(part, kept, 30):
            view[...] = tensors[key][of_tensor]
        assert np.array_equal(part, leaf[np.ix_(*kept)])


@pytest.mark.parametrize(
    "arguments",
    [
        ("x", ("a", "b")),
        ("x", ("a", "b"), "interleave", (3, 2)),
        ("x", ("a",), "interleave", (3,)),
        ("x", ("a", "b"), "fuse", (1,)),
        ("x", ("a", "{layer}.b"), "fuse", (1, 1)),
        ("x", ("a",), "transpose", (1,)),
    ],
)
def test_impossible_rules_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="Rule x"):
        Rule(*arguments)


def test_rows_of_a_fused_rule_must_fill_the_leaf() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1\) rows for \(3,\)"):
        list(Rule("x", ("a", "b"), "fuse", (1, 1)).views(np.zeros(3)))


def test_linear_transposes_only_the_weight() -> None:
    assert [rule.op for rule in linear("x", "y", bias=True, op="transpose")] == [
        "transpose",
        "same",
    ]


def test_keys_without_the_prefix() -> None:
    config = CONFIGS["gpt2"]
    key_map = GPT2.key_map(config)
    assert key_map.as_in(["transformer.wte.weight", "x"]) is key_map
    bare = key_map.as_in(["wte.weight", "lm_head.weight"])
    assert bare.embedding == "wte.weight"
    assert bare.ignored == ("h.{layer}.attn.bias", "h.{layer}.attn.masked_bias")
    assert bare.rules[0].keys == ("wpe.weight",)


def test_published_gpt2_config() -> None:
    assert from_hf(GPT2, PUBLISHED_GPT2, "config.json") == eqx_gpt.get_config("gpt2")


def test_defaults_are_those_of_transformers() -> None:
    assert from_hf(GPT2, {}, "") == eqx_gpt.get_config("gpt2")
    llama = from_hf(LLAMA, {}, "")
    assert (llama.n_layer, llama.n_embd, llama.mlp.n_inner, llama.head) == (
        32,
        4096,
        11008,
        "untied",
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_the_round_trip(name: str) -> None:
    config = CONFIGS[name]
    family, held = family_for(config)
    assert held == config
    assert from_hf(family, to_hf(family, held), "") == held


def test_old_spelling_of_rope_theta() -> None:
    assert from_hf(LLAMA, {"rope_theta": 5e5}, "").position.rope_theta == 5e5
    both = {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert from_hf(LLAMA, both, "").position.rope_theta == 5e5
    # As transformers has it, where they differ.
    assert from_hf(LLAMA, both | {"rope_theta": 1.0}, "").position.rope_theta == 5e5


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "only False is supported"),
        ("gpt2", {"scale_attn_weights": False}, "only True is supported"),
        ("gpt2", {"add_cross_attention": True}, "only False is supported"),
        ("gpt2", {"alibi": True}, "alibi is True, a field that is not understood"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt2", {"activation_function": "mish"}, "expected one of 'gelu_new'"),
        ("gpt2", {"n_ctx": 7}, "n_ctx is 7|n_positions is 1024"),
        ("gpt2", {"n_layer": "12"}, "n_layer is '12', expected a whole number above 0"),
        ("gpt2", {"n_layer": True}, "expected a whole number above 0"),
        ("gpt2", {"n_layer": 0}, "expected a whole number above 0"),
        ("gpt2", {"n_layer": 10**30}, "expected a whole number above 0"),
        ("gpt2", {"n_inner": 1.5}, "expected a whole number above 0"),
        ("gpt2", {"layer_norm_epsilon": float("nan")}, "expected a number above 0"),
        ("gpt2", {"layer_norm_epsilon": "1e-5"}, "expected a number above 0"),
        ("gpt2", {"tie_word_embeddings": 1}, "expected true or false"),
        ("gpt2", {"activation_function": ["gelu"]}, "expected one of"),
        ("gpt2", {"n_head": 7}, "n_embd=768 is not a multiple of n_head=7"),
        ("llama", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk', only"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "factor is None, expected a number"),
        ("llama", {"rope_parameters": {"factor": 2.0}}, "factor of rope_type 'default' is 2.0"),
        ("llama", {"rope_parameters": 7}, "rope_parameters is 7, expected an object"),
        ("llama", {"sliding_window": 128}, "sliding_window is 128"),
    ],
)  # fmt: skip
def test_configs_that_mean_something_else_are_refused(
    family: str, fields: dict[str, Any], message: str
) -> None:
    full = {"n_positions": 1024, **fields} if family == "gpt2" else fields
    with pytest.raises(WeightsError, match=message):
        from_hf(FAMILIES[family], full, "config.json")


def test_all_problems_of_a_config_are_named_at_once() -> None:
    fields = {"n_layer": 0, "alibi": True, "scale_attn_weights": False, "n_embd": None}
    with pytest.raises(WeightsError) as caught:
        from_hf(GPT2, fields, "here")
    assert str(caught.value).startswith("here: 3 problems")
    assert all(name in str(caught.value) for name in ("n_layer", "alibi", "scale_attn_weights"))


def test_null_is_absent() -> None:
    assert from_hf(GPT2, {"n_inner": None, "rope_scaling": None}, "") == from_hf(GPT2, {}, "")


@pytest.mark.parametrize("model_type", ["gpt22", 7, None])
def test_unknown_families_are_refused(model_type: Any) -> None:
    with pytest.raises(WeightsError, match=r"did you mean 'gpt2'|expected a string"):
        family_of({"model_type": model_type}, "config.json")


def test_training_choices_are_held_by_gpt2() -> None:
    config = GPTConfig(
        vocab_size=50304,
        n_token=50257,
        dropout=0.2,
        remat="block",
        unroll=2,
        norm=NormConfig(bias=False),
        attention=AttentionConfig(qkv_bias=False, out_bias=False),
        mlp=MLPConfig(bias=False),
    )
    family, held = family_for(config)
    assert family is GPT2
    assert held == dataclasses.replace(eqx_gpt.get_config("gpt2"), dropout=0.2)
    assert to_hf(family, held)["attn_pdrop"] == 0.2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position": PositionConfig("rope")}, "position.kind is 'rope', there it is 'learned'"),
        ({"norm": NormConfig("rmsnorm", bias=False)}, "norm.kind is 'rmsnorm'"),
        ({"mlp": MLPConfig("gated")}, "mlp.kind is 'gated'"),
        ({"attention": AttentionConfig(n_kv_head=3)}, "attention.n_kv_head is 3, there it is 12"),
        ({"attention": AttentionConfig(head_dim=32)}, "attention.head_dim is 32, there it is 64"),
        ({"n_head": 5, "attention": AttentionConfig(head_dim=32)}, "not a multiple of n_head=5"),
    ],
)
def test_what_gpt2_cannot_hold_is_named(change: dict[str, Any], reason: str) -> None:
    config = GPTConfig(**change)
    assert any(reason in found for found in closest(GPT2, config)[1])
    with pytest.raises(WeightsError, match="a gpt2 of transformers is not this model: ") as caught:
        family_for(config, "gpt2")
    assert reason in str(caught.value)
    with pytest.raises(WeightsError, match="holds this model; the nearest: 3 problems"):
        family_for(config)


def test_a_bias_that_the_files_lack_is_in_the_way() -> None:
    _, reasons = closest(LLAMA, GPTConfig())
    assert "norm.bias is True, there it is False" in reasons
    assert not any(reason.startswith("attention") for reason in reasons)


def test_llama_shares_the_biases_of_attention() -> None:
    partly = AttentionConfig(n_kv_head=2, head_dim=4, qkv_bias=True, out_bias=False)
    held, reasons = closest(LLAMA, GPTConfig(**{**vars(LLAMA_CONFIG), "attention": partly}))
    assert held.attention.out_bias
    assert not reasons


def test_llama_refuses_what_transformers_refuses() -> None:
    config = GPTConfig(**{**vars(LLAMA_CONFIG), "n_embd": 13})
    (reason,) = closest(LLAMA, config)[1]
    assert "n_embd=13 is no multiple of n_head=6" in reason
