"""Llama 1 to 3.2 (Touvron et al. 2023, arXiv:2302.13971) and all that kept its shape: SmolLM2,
TinyLlama, ..."""

from eqx_gpt.config import GPTConfig
from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope
from weights.layout import LLAMA_BLOCK, PRE_NORM, llama_like, llama_sizes


def refusal(config: GPTConfig) -> str | None:
    whole = config.n_embd % config.n_head == 0
    return None if whole else f"n_embd={config.n_embd} is no multiple of n_head={config.n_head}"


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    base=LLAMA_BLOCK,
    fields={
        **llama_sizes(
            vocab_size=32000,
            max_position_embeddings=2048,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=None,
        ),
        "head_dim": Field(None, ("attention.head_dim",)),
        "hidden_act": Field("silu", ("mlp.activation",), ACTIVATIONS),
        "rms_norm_eps": Field(1e-6, ("norm.eps",)),
        "attention_bias": Field(False, ("attention.qkv_bias", "attention.out_bias")),
        "mlp_bias": Field(False, ("mlp.bias",)),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(),),
    aliases={"max_sequence_length": "max_position_embeddings"},
    fixed={"rope_interleaved": False},
    dropout=("attention_dropout",),
    # pretraining_tp splits products without changing them
    ignored=frozenset({"pretraining_tp", "is_llama_config"}),
    key_map=lambda config: llama_like(config, norms=PRE_NORM),
    refusal=refusal,
)
