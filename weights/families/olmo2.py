"""OLMo 2 (OLMo Team 2024, arXiv:2501.00656): each branch is normalised at its end, queries and
keys over all heads together."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope
from weights.layout import llama_like

POST_NORM = {
    "post_norm1": "post_attention_layernorm",
    "post_norm2": "post_feedforward_layernorm",
}


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    base={
        "norm.kind": "rmsnorm",
        "norm.bias": False,
        "position.kind": "rope",
        "mlp.kind": "gated",
        "mlp.bias": False,
        "residual": "post_norm",
        "attention.qk_norm": "all_heads",
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
        "rms_norm_eps": Field(1e-5, ("norm.eps",)),
        "attention_bias": Field(False, ("attention.qkv_bias", "attention.out_bias")),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(),),
    dropout=("attention_dropout",),
    key_map=lambda config: llama_like(config, norms=POST_NORM),
)
