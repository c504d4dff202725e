"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases for q, k and v."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import late_windows, rope
from weights.layout import PRE_NORM, llama_like

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    base={
        "norm.kind": "rmsnorm",
        "norm.bias": False,
        "position.kind": "rope",
        "mlp.kind": "gated",
        "mlp.bias": False,
        "attention.qkv_bias": True,
        "attention.out_bias": False,
    },
    fields={
        "vocab_size": Field(151936, ("vocab_size",)),
        "max_position_embeddings": Field(32768, ("block_size",)),
        "hidden_size": Field(4096, ("n_embd",)),
        "intermediate_size": Field(22016, ("mlp.n_inner",)),
        "num_hidden_layers": Field(32, ("n_layer",)),
        "num_attention_heads": Field(32, ("n_head",)),
        "num_key_value_heads": Field(32, ("attention.n_kv_head",)),
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
