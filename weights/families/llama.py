"""Llama 1 to 3 (Touvron et al. 2023, arXiv:2302.13971), without rope scaling."""

from eqx_gpt.config import GPTConfig
from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.rules import KeyMap, Rule, linear


def key_map(config: GPTConfig) -> KeyMap:
    layer, bias = "model.layers.{layer}.", config.attention.qkv_bias
    q_rows, kv_rows = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    rows = (q_rows, kv_rows, kv_rows)
    qkv = [f"{layer}self_attn.{name}_proj" for name in "qkv"]
    return KeyMap(
        rules=(
            Rule("blocks.norm1.weight", (layer + "input_layernorm.weight",)),
            *linear("blocks.attention.qkv", *qkv, bias=bias, op="fuse", rows=rows),
            *linear("blocks.attention.out", layer + "self_attn.o_proj", bias=bias),
            Rule("blocks.norm2.weight", (layer + "post_attention_layernorm.weight",)),
            *linear("blocks.mlp.up", layer + "mlp.up_proj", bias=config.mlp.bias),
            *linear("blocks.mlp.gate", layer + "mlp.gate_proj", bias=config.mlp.bias),
            *linear("blocks.mlp.down", layer + "mlp.down_proj", bias=config.mlp.bias),
            Rule("norm.weight", ("model.norm.weight",)),
        ),
        embedding="model.embed_tokens.weight",
        prefix="model.",
        ignored=(layer + "self_attn.rotary_emb.inv_freq",),  # a table, in old files
    )


def refusal(config: GPTConfig) -> str | None:
    whole = config.n_embd % config.n_head == 0
    return None if whole else f"n_embd={config.n_embd} is no multiple of n_head={config.n_head}"


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    base={
        "norm.kind": "rmsnorm",
        "norm.bias": False,
        "position.kind": "rope",
        "mlp.kind": "gated",
    },
    fields={
        "vocab_size": Field(32000, ("vocab_size",)),
        "max_position_embeddings": Field(2048, ("block_size",)),
        "hidden_size": Field(4096, ("n_embd",)),
        "intermediate_size": Field(11008, ("mlp.n_inner",)),
        "num_hidden_layers": Field(32, ("n_layer",)),
        "num_attention_heads": Field(32, ("n_head",)),
        "num_key_value_heads": Field(None, ("attention.n_kv_head",)),
        "head_dim": Field(None, ("attention.head_dim",)),
        "hidden_act": Field("silu", ("mlp.activation",), ACTIVATIONS),
        "rms_norm_eps": Field(1e-6, ("norm.eps",)),
        "rope_parameters.rope_theta": Field(10_000.0, ("position.rope_theta",)),
        "attention_bias": Field(False, ("attention.qkv_bias", "attention.out_bias")),
        "mlp_bias": Field(False, ("mlp.bias",)),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    aliases={"rope_theta": "rope_parameters.rope_theta"},
    fixed={"rope_parameters.rope_type": "default"},  # rope_scaling is in no list, and so refused
    dropout=("attention_dropout",),
    ignored=frozenset({"pretraining_tp"}),  # splits products without changing them
    key_map=key_map,
    refusal=refusal,
)
