"""GPT-Neo (Black et al. 2021): GPT-2 with unscaled scores and a window in every other layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from eqx_gpt.config import GPTConfig, LayerConfig
from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import Group, period, window_size
from weights.layout import separate_qkv
from weights.rules import KeyMap, Rule, linear

GLOBAL, LOCAL = "global", "local"


def read_types(hf: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
    """attention_types is [[types, repeats], ...]; attention_layers is the same, written out."""
    given = hf.get("attention_types") or [[[GLOBAL, LOCAL], 12]]
    expected = f"expected [[types, repeats]] of {config.n_layer} times {GLOBAL!r} or {LOCAL!r}"
    types: list[str] = []
    for item in given if isinstance(given, list) else [None]:
        match item:
            case [list(kinds), int(n)] if kinds and n > 0 and len(kinds) * n <= config.n_layer:
                types += kinds * n
            case _:
                raise ValueError(f"attention_types is {given!r:.80}, {expected}")
    if len(types) != config.n_layer or any(kind not in (GLOBAL, LOCAL) for kind in types):
        raise ValueError(f"attention_types is {given!r:.80}, {expected}")
    if hf.get("attention_layers") not in (None, types):
        raise ValueError(f"attention_layers is {hf['attention_layers']!r:.80}, expected {types}")
    window = LayerConfig(window_size(hf, "window_size", 256))
    if window.window is None:
        raise ValueError("window_size is null, expected a whole number above 0")
    return dataclasses.replace(
        config, layers=period([window if kind == LOCAL else LayerConfig() for kind in types])
    )


def write_types(config: GPTConfig) -> dict[str, Any]:
    n = len(config.layers)
    windows = [config.layers[i % n].window for i in range(config.n_layer)]
    types = [GLOBAL if window is None else LOCAL for window in windows]
    size = max((window for window in windows if window is not None), default=256)
    return {"attention_types": [[types, 1]], "window_size": size}


def key_map(config: GPTConfig) -> KeyMap:
    layer = "transformer.h.{layer}."
    attention = layer + "attn.attention."
    return KeyMap(
        rules=(
            Rule("wpe.weight", ("transformer.wpe.weight",)),
            *linear("blocks.norm1", layer + "ln_1", bias=True),
            *separate_qkv(config, *(f"{attention}{x}_proj" for x in "qkv")),
            *linear("blocks.attention.out", attention + "out_proj", bias=True),
            *linear("blocks.norm2", layer + "ln_2", bias=True),
            *linear("blocks.mlp.up", layer + "mlp.c_fc", bias=True),
            *linear("blocks.mlp.down", layer + "mlp.c_proj", bias=True),
            *linear("norm", "transformer.ln_f", bias=True),
        ),
        embedding="transformer.wte.weight",
        prefix="transformer.",
        ignored=(attention + "bias", attention + "masked_bias"),  # causal masks of old files
    )


GPT_NEO = Family(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    base={"attention.qkv_bias": False, "attention.scale": 1.0},
    fields={
        "vocab_size": Field(50257, ("vocab_size",)),
        "max_position_embeddings": Field(2048, ("block_size",)),
        "hidden_size": Field(2048, ("n_embd",)),
        "intermediate_size": Field(None, ("mlp.n_inner",)),
        "num_layers": Field(24, ("n_layer",)),
        "num_heads": Field(16, ("n_head",)),
        "activation_function": Field("gelu_new", ("mlp.activation",), ACTIVATIONS),
        "layer_norm_epsilon": Field(1e-5, ("norm.eps",)),
        "tie_word_embeddings": Field(True, ("head",), HEAD),
    },
    groups=(
        Group(
            frozenset({"attention_types", "attention_layers", "window_size"}),
            read_types,
            write_types,
        ),
    ),
    dropout=("attention_dropout", "embed_dropout", "resid_dropout"),
    ignored=frozenset(  # of other heads than the language model's
        {
            "classifier_dropout",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
    key_map=key_map,
)
