"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope, window
from weights.layout import LLAMA_BLOCK, PRE_NORM, llama_like, llama_sizes

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    base={
        **LLAMA_BLOCK,
        "mlp.bias": False,
        "attention.qkv_bias": False,
        "attention.out_bias": False,
    },
    fields={
        **llama_sizes(
            vocab_size=32000,
            max_position_embeddings=131072,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        "head_dim": Field(None, ("attention.head_dim",)),
        "hidden_act": Field("silu", ("mlp.activation",), ACTIVATIONS),
        "rms_norm_eps": Field(1e-6, ("norm.eps",)),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(), window(4096)),
    dropout=("attention_dropout",),
    key_map=lambda config: llama_like(config, norms=PRE_NORM),
)
