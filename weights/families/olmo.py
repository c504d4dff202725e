"""OLMo (Groeneveld et al. 2024, arXiv:2402.00838): Llama with norms that learn nothing."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope
from weights.layout import llama_like, llama_sizes

OLMO = Family(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    base={
        "norm.bias": False,
        "norm.scale": "none",
        "position.kind": "rope",
        "mlp.kind": "gated",
        "mlp.bias": False,
    },
    fields={
        **llama_sizes(
            vocab_size=50304,
            max_position_embeddings=2048,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=None,
        ),
        "hidden_act": Field("silu", ("mlp.activation",), ACTIVATIONS),
        "attention_bias": Field(False, ("attention.qkv_bias", "attention.out_bias")),
        "clip_qkv": Field(None, ("attention.clip_qkv",), kind=float),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(),),
    dropout=("attention_dropout",),
    ignored=frozenset({"pretraining_tp"}),  # transformers does not read it here
    key_map=lambda config: llama_like(config, norms={}),
)
