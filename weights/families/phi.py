"""Phi 1, 1.5 and 2 (Gunasekar et al. 2023, arXiv:2306.11644): both branches after one norm."""

from eqx_gpt.config import GPTConfig
from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope
from weights.layout import llama_like, llama_sizes
from weights.rules import KeyMap


def key_map(config: GPTConfig) -> KeyMap:
    return llama_like(
        config,
        norms={"norm1": "input_layernorm"},
        mlp={"up": "fc1", "down": "fc2"},
        qk_norms=("q_layernorm", "k_layernorm"),
        out="dense",
        final_norm="final_layernorm",
    )


PHI = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    base={
        "residual": "parallel_shared_norm",
        "position.kind": "rope",
        "head_bias": True,
    },
    fields={
        **llama_sizes(
            vocab_size=51200,
            max_position_embeddings=2048,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=None,
        ),
        "hidden_act": Field("gelu_new", ("mlp.activation",), ACTIVATIONS),
        "layer_norm_eps": Field(1e-5, ("norm.eps",)),
        "qk_layernorm": Field(False, ("attention.qk_norm",), {False: "none", True: "head"}),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(share=0.5),),
    dropout=("attention_dropout", "embd_pdrop", "resid_pdrop"),
    key_map=key_map,
)
