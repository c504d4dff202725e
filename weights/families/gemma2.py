"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): norms before and after each branch, soft caps, and
a sliding window in every other layer."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import alternating_windows, query_scale, rope
from weights.layout import LLAMA_BLOCK, SANDWICH, llama_like, llama_sizes

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    base={
        **LLAMA_BLOCK,
        "mlp.bias": False,
        "norm.scale": "one_plus_weight",
        "embedding_scale": "sqrt_n_embd",
        "residual": "sandwich",
    },
    fields={
        **llama_sizes(
            vocab_size=256000,
            max_position_embeddings=8192,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
        "head_dim": Field(256, ("attention.head_dim",)),
        "hidden_activation": Field("gelu_pytorch_tanh", ("mlp.activation",), ACTIVATIONS),
        "rms_norm_eps": Field(1e-6, ("norm.eps",)),
        "attention_bias": Field(False, ("attention.qkv_bias", "attention.out_bias")),
        "attn_logit_softcapping": Field(50.0, ("attention.softcap",), null="none", kind=float),
        "final_logit_softcapping": Field(30.0, ("logit_softcap",), null="none", kind=float),
        "tie_word_embeddings": Field(True, ("head",), HEAD),
    },
    groups=(rope(), query_scale(), alternating_windows(2)),
    aliases={"sliding_window_size": "sliding_window"},
    fixed={"use_bidirectional_attention": False},
    dropout=("attention_dropout",),
    ignored=frozenset({"hidden_act"}),  # transformers does not read it here
    key_map=lambda config: llama_like(config, norms=SANDWICH),
)
