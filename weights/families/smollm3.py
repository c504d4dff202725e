"""SmolLM3 (Bakouch et al. 2025): Llama without rotary positions in every fourth layer
(arXiv:2501.18795)."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope, some_ropes
from weights.layout import PRE_NORM, llama_like

SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    base={
        "norm.kind": "rmsnorm",
        "norm.bias": False,
        "position.kind": "rope",
        "mlp.kind": "gated",
    },
    fields={
        "vocab_size": Field(128256, ("vocab_size",)),
        "max_position_embeddings": Field(32768, ("block_size",)),
        "hidden_size": Field(2048, ("n_embd",)),
        "intermediate_size": Field(11008, ("mlp.n_inner",)),
        "num_hidden_layers": Field(36, ("n_layer",)),
        "num_attention_heads": Field(16, ("n_head",)),
        "num_key_value_heads": Field(4, ("attention.n_kv_head",)),
        "head_dim": Field(None, ("attention.head_dim",)),
        "hidden_act": Field("silu", ("mlp.activation",), ACTIVATIONS),
        "rms_norm_eps": Field(1e-6, ("norm.eps",)),
        "attention_bias": Field(False, ("attention.qkv_bias", "attention.out_bias")),
        "mlp_bias": Field(False, ("mlp.bias",)),
        "tie_word_embeddings": Field(True, ("head",), HEAD),
    },
    groups=(rope(theta=2_000_000.0), some_ropes()),
    dropout=("attention_dropout",),
    # transformers reads neither here
    ignored=frozenset({"max_window_layers", "pretraining_tp"}),
    key_map=lambda config: llama_like(config, norms=PRE_NORM),
)
