"""OLMo (Groeneveld et al. 2024, arXiv:2402.00838): Llama with norms that learn nothing."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope
from weights.layout import llama_like

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
        "vocab_size": Field(50304, ("vocab_size",)),
        "max_position_embeddings": Field(2048, ("block_size",)),
        "hidden_size": Field(4096, ("n_embd",)),
        "intermediate_size": Field(11008, ("mlp.n_inner",)),
        "num_hidden_layers": Field(32, ("n_layer",)),
        "num_attention_heads": Field(32, ("n_head",)),
        "num_key_value_heads": Field(None, ("attention.n_kv_head",)),
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
