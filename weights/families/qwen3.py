"""Qwen 3 (Yang et al. 2025, arXiv:2505.09388): Llama with normalised queries and keys."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import late_windows, rope
from weights.layout import PRE_NORM, llama_like

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    base={
        "norm.kind": "rmsnorm",
        "norm.bias": False,
        "position.kind": "rope",
        "mlp.kind": "gated",
        "mlp.bias": False,
        "attention.qk_norm": "head",
    },
    fields={
        "vocab_size": Field(151936, ("vocab_size",)),
        "max_position_embeddings": Field(32768, ("block_size",)),
        "hidden_size": Field(4096, ("n_embd",)),
        "intermediate_size": Field(22016, ("mlp.n_inner",)),
        "num_hidden_layers": Field(32, ("n_layer",)),
        "num_attention_heads": Field(32, ("n_head",)),
        "num_key_value_heads": Field(32, ("attention.n_kv_head",)),
        "head_dim": Field(128, ("attention.head_dim",)),
        "hidden_act": Field("silu", ("mlp.activation",), ACTIVATIONS),
        "rms_norm_eps": Field(1e-6, ("norm.eps",)),
        "attention_bias": Field(False, ("attention.qkv_bias", "attention.out_bias")),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(), late_windows()),
    dropout=("attention_dropout",),
    key_map=lambda config: llama_like(config, norms=PRE_NORM),
)
