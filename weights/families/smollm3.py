"""SmolLM3 (Bakouch et al. 2025): Llama without rotary positions in every fourth layer
(arXiv:2501.18795)."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope, some_ropes
from weights.layout import LLAMA_BLOCK, PRE_NORM, llama_like, llama_sizes

SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    base=LLAMA_BLOCK,
    fields={
        **llama_sizes(
            vocab_size=128256,
            max_position_embeddings=32768,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
        ),
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
