"""OPT (Zhang et al. 2022, arXiv:2205.01068), all sizes but 350M, whose norms stand elsewhere."""

from collections.abc import Mapping
from typing import Any

from eqx_gpt.config import GPTConfig
from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import Group
from weights.layout import separate_qkv
from weights.rules import KeyMap, Rule, linear


def read_width(hf: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
    width = hf.get("word_embed_proj_dim")
    if width not in (None, config.n_embd):
        raise ValueError(f"word_embed_proj_dim is {width!r:.80}, only {config.n_embd} is supported")
    return config


def key_map(config: GPTConfig) -> KeyMap:
    layer, bias = "model.decoder.layers.{layer}.", config.mlp.bias
    return KeyMap(
        rules=(
            Rule("wpe.weight", ("model.decoder.embed_positions.weight",)),
            *linear("blocks.norm1", layer + "self_attn_layer_norm", bias=True),
            *separate_qkv(config, *(f"{layer}self_attn.{x}_proj" for x in "qkv")),
            *linear("blocks.attention.out", layer + "self_attn.out_proj", bias=bias),
            *linear("blocks.norm2", layer + "final_layer_norm", bias=True),
            *linear("blocks.mlp.up", layer + "fc1", bias=bias),
            *linear("blocks.mlp.down", layer + "fc2", bias=bias),
            *linear("norm", "model.decoder.final_layer_norm", bias=True),
        ),
        embedding="model.decoder.embed_tokens.weight",
        prefix="model.",
    )


OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    base={"position.offset": 2},
    fields={
        "vocab_size": Field(50272, ("vocab_size",)),
        "max_position_embeddings": Field(2048, ("block_size",)),
        "hidden_size": Field(768, ("n_embd",)),
        "ffn_dim": Field(3072, ("mlp.n_inner",)),
        "num_hidden_layers": Field(12, ("n_layer",)),
        "num_attention_heads": Field(12, ("n_head",)),
        "activation_function": Field("relu", ("mlp.activation",), ACTIVATIONS),
        "enable_bias": Field(True, ("attention.qkv_bias", "attention.out_bias", "mlp.bias")),
        "tie_word_embeddings": Field(True, ("head",), HEAD),
    },
    groups=(
        Group(
            frozenset({"word_embed_proj_dim"}),
            read_width,
            lambda config: {"word_embed_proj_dim": config.n_embd},
        ),
    ),
    fixed={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
    dropout=("dropout", "attention_dropout"),
    ignored=frozenset({"activation_dropout", "layerdrop", "init_std"}),
    key_map=key_map,
)
