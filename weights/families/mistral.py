"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope, window
from weights.layout import PRE_NORM, llama_like

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    base={
        "norm.kind": "rmsnorm",
        "norm.bias": False,
        "position.kind": "rope",
        "mlp.kind": "gated",
        "mlp.bias": False,
        "attention.qkv_bias": False,
        "attention.out_bias": False,
    },
    fields={
        "vocab_size": Field(32000, ("vocab_size",)),
        "max_position_embeddings": Field(131072, ("block_size",)),
        "hidden_size": Field(4096, ("n_embd",)),
        "intermediate_size": Field(14336, ("mlp.n_inner",)),
        "num_hidden_layers": Field(32, ("n_layer",)),
        "num_attention_heads": Field(32, ("n_head",)),
        "num_key_value_heads": Field(8, ("attention.n_kv_head",)),
        "head_dim": Field(None, ("attention.head_dim",)),
        "hidden_act": Field("silu", ("mlp.activation",), ACTIVATIONS),
        "rms_norm_eps": Field(1e-6, ("norm.eps",)),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(), window(4096)),
    dropout=("attention_dropout",),
    key_map=lambda config: llama_like(config, norms=PRE_NORM),
)
