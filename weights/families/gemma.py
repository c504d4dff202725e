"""Gemma (Gemma Team 2024, arXiv:2403.08295): embeddings scaled up, norms by 1 + the weight."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope
from weights.layout import LLAMA_BLOCK, PRE_NORM, llama_like, llama_sizes

# The first files said "gelu" and meant the approximation.
GELU_MEANS_TANH = {"gelu_pytorch_tanh": "gelu_tanh", **ACTIVATIONS, "gelu": "gelu_tanh"}


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    base={
        **LLAMA_BLOCK,
        "mlp.bias": False,
        "norm.scale": "one_plus_weight",
        "embedding_scale": "sqrt_n_embd",
    },
    fields={
        **llama_sizes(
            vocab_size=256000,
            max_position_embeddings=8192,
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
        ),
        "head_dim": Field(256, ("attention.head_dim",)),
        "hidden_act": Field("gelu_pytorch_tanh", ("mlp.activation",), GELU_MEANS_TANH),
        "rms_norm_eps": Field(1e-6, ("norm.eps",)),
        "attention_bias": Field(False, ("attention.qkv_bias", "attention.out_bias")),
        "tie_word_embeddings": Field(True, ("head",), HEAD),
    },
    groups=(rope(),),
    fixed={"use_bidirectional_attention": False},
    dropout=("attention_dropout",),
    ignored=frozenset({"hidden_activation"}),  # transformers does not read it here
    key_map=lambda config: llama_like(config, norms=PRE_NORM),
)
