"""Tiny models of every family, as arguments of transformers' configs.

Sizes are distinct, so that no two axes can be taken for each other.
"""

from typing import Any

import transformers

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
VOCAB, BLOCK = 71, 43

_COMMON: dict[str, Any] = {"vocab_size": VOCAB, **NO_TOKENS}
_GPT2 = {**_COMMON, "n_positions": BLOCK, "n_embd": 28, "n_layer": 3, "n_head": 7}
_BODY: dict[str, Any] = {
    **_COMMON,
    "max_position_embeddings": BLOCK,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
}
_GROUPED = {**_BODY, "num_attention_heads": 6, "num_key_value_heads": 2}
_MULTI_HEAD = {**_BODY, "num_attention_heads": 3}
_WIDE = {**_GROUPED, "head_dim": 10}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 17,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 4.0,
    "original_max_position_embeddings": 31,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {
        "as published": _GPT2,
        "exact gelu, narrow mlp": {**_GPT2, "activation_function": "gelu", "n_inner": 37},
        "untied, large epsilon": {
            **_GPT2,
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-2,
        },
        "relu": {**_GPT2, "activation_function": "relu"},
    },
    "gpt_neo": {
        "global and local, untied": {
            **_COMMON,
            "max_position_embeddings": BLOCK,
            "hidden_size": 28,
            "num_layers": 3,
            "num_heads": 7,
            "attention_types": [[["global", "local"], 1], [["global"], 1]],
            "window_size": 5,
            "tie_word_embeddings": False,
        },
        "all global, narrow mlp": {
            **_COMMON,
            "max_position_embeddings": BLOCK,
            "hidden_size": 28,
            "intermediate_size": 37,
            "num_layers": 2,
            "num_heads": 7,
            "attention_types": [[["global"], 2]],
        },
    },
    "gptj": {
        "a part of each head": {
            **_COMMON,
            "n_positions": BLOCK,
            "n_embd": 30,
            "n_layer": 3,
            "n_head": 3,
            "rotary_dim": 6,
        },
        "whole heads, narrow mlp": {
            **_COMMON,
            "n_positions": BLOCK,
            "n_embd": 30,
            "n_inner": 37,
            "n_layer": 2,
            "n_head": 5,
            "rotary_dim": 6,
        },
    },
    "gpt_neox": {
        "a part of each head": {**_MULTI_HEAD, "rope_parameters": {"partial_rotary_factor": 0.5}},
        "sequential, tied, without biases": {
            **_MULTI_HEAD,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    },
    "opt": {
        "as published": {
            **_COMMON,
            "max_position_embeddings": BLOCK,
            "hidden_size": 24,
            "ffn_dim": 37,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
        },
        "without biases, untied, gelu": {
            **_COMMON,
            "max_position_embeddings": BLOCK,
            "hidden_size": 24,
            "ffn_dim": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "enable_bias": False,
            "tie_word_embeddings": False,
            "activation_function": "gelu",
        },
    },
    "llama": {
        "grouped": _GROUPED,
        "one key-value head, tied": {
            **_BODY,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        "multi-head, biases, wide heads, theta": {
            **_MULTI_HEAD,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
            "rms_norm_eps": 1e-2,
        },
        "scaled as llama 3.1": {**_GROUPED, "rope_parameters": _LLAMA3},
        "scaled linearly": {**_GROUPED, "rope_parameters": _LINEAR},
        "scaled by yarn": {**_GROUPED, "rope_parameters": _YARN},
    },
    "mistral": {
        "window": {**_WIDE, "sliding_window": 5},
        "no window, tied": {**_GROUPED, "sliding_window": None, "tie_word_embeddings": True},
    },
    "qwen2": {
        "grouped, tied": {**_GROUPED, "tie_word_embeddings": True},
        "windows in the later layers": {
            **_GROUPED,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        "multi-head, yarn": {**_MULTI_HEAD, "num_key_value_heads": 3, "rope_parameters": _YARN},
    },
    "qwen3": {
        "grouped, tied": {**_WIDE, "tie_word_embeddings": True},
        "multi-head, biases, windows": {
            **_MULTI_HEAD,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    },
    "gemma": {
        "one key-value head": {**_WIDE, "num_key_value_heads": 1},
        "multi-head, untied": {
            **_MULTI_HEAD,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "tie_word_embeddings": False,
        },
    },
    "gemma2": {
        "window": {**_WIDE, "sliding_window": 5, "query_pre_attn_scalar": 7},
        "without soft caps": {
            **_WIDE,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "sliding_window": 11,
        },
        "strong soft caps, given types": {
            **_WIDE,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    },
    "gemma3_text": {
        "five and one": {**_WIDE, "num_hidden_layers": 8, "sliding_window": 5},
        "scaled, given types": {
            **_WIDE,
            "sliding_window": 5,
            "query_pre_attn_scalar": 13,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {**_LINEAR, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    },
    "phi": {
        "as published": _MULTI_HEAD,
        "grouped, normalised": {
            **_GROUPED,
            "hidden_size": 48,
            "qk_layernorm": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.75,
            },
        },
    },
    "olmo": {
        "clipped": {**_MULTI_HEAD, "clip_qkv": 0.4},
        "grouped, tied": {**_GROUPED, "tie_word_embeddings": True},
    },
    "olmo2": {
        "multi-head": _MULTI_HEAD,
        "grouped, tied": {**_GROUPED, "tie_word_embeddings": True},
    },
    "smollm3": {
        "every fourth layer without rope": {**_GROUPED, "num_hidden_layers": 5},
        "given layers, untied": {
            **_GROUPED,
            "no_rope_layers": [0, 1, 1],
            "tie_word_embeddings": False,
            "mlp_bias": True,
        },
        "windows": {**_GROUPED, "use_sliding_window": True, "sliding_window": 5},
    },
    "starcoder2": {
        "window": {**_GROUPED, "sliding_window": 5},
        "without biases, untied": {
            **_GROUPED,
            "use_bias": False,
            "tie_word_embeddings": False,
            "sliding_window": None,
        },
    },
}


def hf_config(model_type: str, case: str) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(model_type, **CASES[model_type][case])
