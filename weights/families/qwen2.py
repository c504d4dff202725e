"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases for q, k and v."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import late_windows, rope
from weights.layout import LLAMA_BLOCK, PRE_NORM, llama_like, llama_sizes

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    base={
        **LLAMA_BLOCK,
        "mlp.bias": False,
        "attention.qkv_bias": True,
        "attention.out_bias": False,
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
        "head_dim": Field(None, ("attention.head_dim",)),
        "hidden_act": Field("silu", ("mlp.activation",), ACTIVATIONS),
        "rms_norm_eps": Field(1e-6, ("norm.eps",)),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(), late_windows()),
    fixed={"use_mrope": False},
    dropout=("attention_dropout",),
    key_map=lambda config: llama_like(config, norms=PRE_NORM),
)
