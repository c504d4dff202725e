"""Gemma 3, text (Gemma Team 2025, arXiv:2503.19786): five layers with a sliding window and a rope
of their own, then one that sees all. Queries and keys are normalised."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import query_scale, two_ropes
from weights.layout import LLAMA_BLOCK, SANDWICH, llama_like, llama_sizes

GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    base={
        **LLAMA_BLOCK,
        "mlp.bias": False,
        "norm.scale": "one_plus_weight",
        "embedding_scale": "sqrt_n_embd",
        "residual": "sandwich",
        "attention.qk_norm": "head",
    },
    fields={
        **llama_sizes(
            vocab_size=262208,
            max_position_embeddings=131072,
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
        "attn_logit_softcapping": Field(None, ("attention.softcap",), null="none", kind=float),
        "final_logit_softcapping": Field(None, ("logit_softcap",), null="none", kind=float),
        "tie_word_embeddings": Field(True, ("head",), HEAD),
    },
    groups=(query_scale(), two_ropes(6)),
    fixed={"use_bidirectional_attention": False},
    dropout=("attention_dropout",),
    ignored=frozenset({"hidden_act"}),  # transformers does not read it here
    key_map=lambda config: llama_like(config, norms=SANDWICH),
)
