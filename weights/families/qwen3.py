"""Qwen 3 (Yang et al. 2025, arXiv:2505.09388): Llama with normalised queries and keys."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import late_windows, rope
from weights.layout import LLAMA_BLOCK, PRE_NORM, llama_like, llama_sizes

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    base={
        **LLAMA_BLOCK,
        "mlp.bias": False,
        "attention.qk_norm": "head",
    },
    fields={
        **llama_sizes(
            vocab_size=151936,
            max_position_embeddings=32768,
            hidden_size=4096,
            intermediate_size=22016,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
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
