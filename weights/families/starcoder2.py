"""StarCoder 2 (Lozhkov et al. 2024, arXiv:2402.19173): grouped attention with rotary positions and
a sliding window, otherwise like GPT-2."""

from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope, window
from weights.layout import PRE_NORM, llama_like, llama_sizes

STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    base={
        "position.kind": "rope",
    },
    fields={
        **llama_sizes(
            vocab_size=49152,
            max_position_embeddings=4096,
            hidden_size=3072,
            intermediate_size=12288,
            num_hidden_layers=30,
            num_attention_heads=24,
            num_key_value_heads=2,
        ),
        "hidden_act": Field("gelu_pytorch_tanh", ("mlp.activation",), ACTIVATIONS),
        "norm_epsilon": Field(1e-5, ("norm.eps",)),
        "use_bias": Field(True, ("attention.qkv_bias", "attention.out_bias", "mlp.bias")),
        "tie_word_embeddings": Field(True, ("head",), HEAD),
    },
    groups=(rope(), window(None)),
    dropout=("attention_dropout", "embedding_dropout", "residual_dropout"),
    ignored=frozenset(  # of the model's first code; transformers reads none of them
        {
            "activation_function",
            "attention_softmax_in_fp32",
            "layer_norm_epsilon",
            "mlp_type",
            "norm_type",
            "scale_attention_softmax_in_fp32",
            "scale_attn_weights",
        }
    ),
    key_map=lambda config: llama_like(config, norms=PRE_NORM, mlp={"up": "c_fc", "down": "c_proj"}),
)
