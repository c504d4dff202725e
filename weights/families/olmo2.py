"""OLMo 2 (OLMo Team 2024, arXiv:2501.00656): each branch is normalised at its end, queries and
keys over all heads together."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope
from weights.layout import LLAMA_BLOCK, llama_like, llama_sizes

POST_NORM = {
    "post_norm1": "post_attention_layernorm",
    "post_norm2": "post_feedforward_layernorm",
}


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    base={
        **LLAMA_BLOCK,
        "mlp.bias": False,
        "residual": "post_norm",
        "attention.qk_norm": "all_heads",
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
        "rms_norm_eps": Field(1e-5, ("norm.eps",)),
        "attention_bias": Field(False, ("attention.qkv_bias", "attention.out_bias")),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(),),
    dropout=("attention_dropout",),
    key_map=lambda config: llama_like(config, norms=POST_NORM),
)
