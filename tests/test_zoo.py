"""The zoo against the models' own config.json files and their published parameter counts.

The tables were written from the files on the hub, not from the zoo: what the rows leave out, the
files leave out as well (or set to what changes nothing).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import pytest

from eqx_gpt import GPT, count_params, get_config, list_models
from eqx_gpt.zoo import HUB_IDS
from weights.families import family_of
from weights.family import from_hf
from weights.hub import find

HF = dict[str, Any]
SMALL_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LARGE_LLAMA3 = {**SMALL_LLAMA3, "factor": 8.0}


def files(model_type: str, names: str, common: HF, rows: Mapping[str, tuple[Any, ...]]) -> HF:
    """model -> config.json: the fields that the family's files agree in, and the row's `names`."""
    shared = {"model_type": model_type, **common}
    return {
        model: {**shared, **dict(zip(names.split(), row, strict=True))}
        for model, row in rows.items()
    }


GPT2 = files(
    "gpt2",
    "n_embd n_layer n_head",
    {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_type": "cls_index",
        "vocab_size": 50257,
    },
    {
        "gpt2": (768, 12, 12),
        "gpt2-medium": (1024, 24, 16),
        "gpt2-large": (1280, 36, 20),
        "gpt2-xl": (1600, 48, 25),
        "distilgpt2": (768, 6, 12),
    },
)

GPT_NEO = files(
    "gpt_neo",
    "hidden_size num_layers num_heads attention_types attention_layers",
    {
        "activation_function": "gelu_new",
        "attention_dropout": 0,
        "embed_dropout": 0,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 2048,
        "resid_dropout": 0,
        "summary_type": "cls_index",
        "vocab_size": 50257,
        "window_size": 256,
    },
    {
        "gpt-neo-125m": (768, 12, 12, [[["global", "local"], 6]], ["global", "local"] * 6),
        "gpt-neo-1.3b": (2048, 24, 16, [[["global", "local"], 12]], ["global", "local"] * 12),
        "gpt-neo-2.7b": (2560, 32, 20, [[["global", "local"], 16]], ["global", "local"] * 16),
    },
)

GPTJ = files(
    "gptj",
    "n_embd n_layer n_head rotary_dim",
    {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_inner": None,
        "n_positions": 2048,
        "rotary": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "vocab_size": 50400,
    },
    {"gpt-j-6b": (4096, 28, 16, 64)},
)

GPT_NEOX = files(
    "gpt_neox",
    "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size hidden_act",
    {
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
    },
    {
        "gpt-neox-20b": (6144, 24576, 44, 64, 50432, "gelu_fast"),
        "pythia-14m": (128, 512, 6, 4, 50304, "gelu"),
        "pythia-31m": (256, 1024, 6, 8, 50304, "gelu"),
        "pythia-70m": (512, 2048, 6, 8, 50304, "gelu"),
        "pythia-160m": (768, 3072, 12, 12, 50304, "gelu"),
        "pythia-410m": (1024, 4096, 24, 16, 50304, "gelu"),
        "pythia-1b": (2048, 8192, 16, 8, 50304, "gelu"),
        "pythia-1.4b": (2048, 8192, 24, 16, 50304, "gelu"),
        "pythia-2.8b": (2560, 10240, 32, 32, 50304, "gelu"),
        "pythia-6.9b": (4096, 16384, 32, 32, 50432, "gelu"),
        "pythia-12b": (5120, 20480, 36, 40, 50688, "gelu"),
    },
)

OPT = files(
    "opt",
    "hidden_size word_embed_proj_dim ffn_dim num_hidden_layers num_attention_heads",
    {
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "prefix": "</s>",
        "vocab_size": 50272,
    },
    {
        "opt-125m": (768, 768, 3072, 12, 12),
        "opt-1.3b": (2048, 2048, 8192, 24, 32),
        "opt-2.7b": (2560, 2560, 10240, 32, 32),
        "opt-6.7b": (4096, 4096, 16384, 32, 32),
        "opt-13b": (5120, 5120, 20480, 40, 40),
        "opt-30b": (7168, 7168, 28672, 48, 56),
        "opt-66b": (9216, 9216, 36864, 64, 72),
    },
)

SHAPE = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "vocab_size max_position_embeddings "
)
LLAMA_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-05, "pretraining_tp": 1}
LLAMA = files(
    "llama",
    SHAPE + "rope_theta rope_scaling tie_word_embeddings",
    LLAMA_COMMON,
    {
        "llama-2-7b-hf": (4096, 11008, 32, 32, 32, 32000, 4096, 1e4, None, False),
        "llama-2-13b-hf": (5120, 13824, 40, 40, 40, 32000, 4096, 1e4, None, False),
        "llama-2-70b-hf": (8192, 28672, 80, 64, 8, 32000, 4096, 1e4, None, False),
        "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000, 2048, 1e4, None, False),
        "meta-llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 8192, 5e5, None, False),
        "meta-llama-3-70b": (8192, 28672, 80, 64, 8, 128256, 8192, 5e5, None, False),
        "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, 131072, 5e5, LARGE_LLAMA3, False),
        "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256, 131072, 5e5, LARGE_LLAMA3, False),
        "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 8192, 100000, None, True),
        "smollm2-360m": (960, 2560, 32, 15, 5, 49152, 8192, 100000, None, True),
        "smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152, 8192, 130000, None, True),
    },
) | files(
    "llama",
    SHAPE + "rope_theta rope_scaling tie_word_embeddings head_dim",
    LLAMA_COMMON,
    {
        "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, 131072, 5e5, SMALL_LLAMA3, True, 64),
        "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, 131072, 5e5, SMALL_LLAMA3, True, 128),
    },
)

SMOLLM3 = files(
    "smollm3",
    SHAPE + "rope_theta no_rope_layers layer_types",
    {
        "attention_bias": False,
        "hidden_act": "silu",
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    {
        "smollm3-3b": (
            *(2048, 11008, 36, 16, 4, 128256, 65536, 5e6),
            [1, 1, 1, 0] * 9,
            ["full_attention"] * 36,
        )
    },
)

MISTRAL = files(
    "mistral",
    SHAPE + "rope_theta sliding_window",
    {"hidden_act": "silu", "rms_norm_eps": 1e-05, "tie_word_embeddings": False},
    {
        "mistral-7b-v0.1": (4096, 14336, 32, 32, 8, 32000, 32768, 1e4, 4096),
        "mistral-7b-v0.3": (4096, 14336, 32, 32, 8, 32768, 32768, 1e6, None),
    },
)

QWEN2 = files(
    "qwen2",
    SHAPE + "rms_norm_eps sliding_window max_window_layers tie_word_embeddings",
    {"hidden_act": "silu", "rope_theta": 1000000.0, "use_sliding_window": False},
    {
        "qwen2-0.5b": (896, 4864, 24, 14, 2, 151936, 131072, 1e-6, 131072, 24, True),
        "qwen2-1.5b": (1536, 8960, 28, 12, 2, 151936, 131072, 1e-6, 131072, 28, True),
        "qwen2-7b": (3584, 18944, 28, 28, 4, 152064, 131072, 1e-6, 131072, 28, False),
        "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, 32768, 1e-6, 32768, 24, True),
        "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, 131072, 1e-6, 131072, 28, True),
        "qwen2.5-1.5b-instruct": (1536, 8960, 28, 12, 2, 151936, 32768, 1e-6, 32768, 21, True),
        "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, 32768, 1e-6, 32768, 36, True),
        "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, 131072, 1e-6, 131072, 28, False),
        "qwen2.5-7b-instruct": (3584, 18944, 28, 28, 4, 152064, 32768, 1e-6, 131072, 28, False),
        "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, 131072, 1e-5, 131072, 48, False),
    },
)

QWEN3 = files(
    "qwen3",
    SHAPE + "max_window_layers tie_word_embeddings",
    {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    {
        "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936, 40960, 28, True),
        "qwen3-0.6b-base": (1024, 3072, 28, 16, 8, 151936, 32768, 28, True),
        "qwen3-1.7b": (2048, 6144, 28, 16, 8, 151936, 40960, 28, True),
        "qwen3-1.7b-base": (2048, 6144, 28, 16, 8, 151936, 32768, 28, True),
        "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, 40960, 36, True),
        "qwen3-4b-base": (2560, 9728, 36, 32, 8, 151936, 32768, 36, True),
        "qwen3-8b": (4096, 12288, 36, 32, 8, 151936, 40960, 36, False),
        "qwen3-8b-base": (4096, 12288, 36, 32, 8, 151936, 32768, 36, False),
    },
)

GEMMA = files(
    "gemma",
    SHAPE + "head_dim",
    {"hidden_act": "gelu", "rms_norm_eps": 1e-06, "rope_theta": 10000.0},
    {
        "gemma-2b": (2048, 16384, 18, 8, 1, 256000, 8192, 256),
        "gemma-7b": (3072, 24576, 28, 16, 16, 256000, 8192, 256),
    },
)

GEMMA2 = files(
    "gemma2",
    SHAPE + "head_dim query_pre_attn_scalar",
    {
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    {
        "gemma-2-2b": (2304, 9216, 26, 8, 4, 256000, 8192, 256, 256),
        "gemma-2-9b": (3584, 14336, 42, 16, 8, 256000, 8192, 256, 256),
        "gemma-2-27b": (4608, 36864, 46, 32, 16, 256000, 8192, 128, 144),
    },
)

LOCAL, GLOBAL = ["sliding_attention"], ["full_attention"]
GEMMA3 = files(
    "gemma3_text",
    SHAPE + "layer_types",
    {
        "_sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
    },
    {
        "gemma-3-270m": (640, 2048, 18, 4, 1, 262144, 32768, (LOCAL * 5 + GLOBAL) * 3),
        "gemma-3-1b-pt": (
            *(1152, 6912, 26, 4, 1, 262144, 32768),
            (LOCAL * 5 + GLOBAL) * 4 + LOCAL * 2,
        ),
    },
)

PHI = files(
    "phi",
    SHAPE + "partial_rotary_factor resid_pdrop",
    {
        "embd_pdrop": 0.0,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-05,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    {
        "phi-1": (2048, 8192, 24, 32, None, 51200, 2048, 0.5, 0.0),
        "phi-1_5": (2048, 8192, 24, 32, None, 51200, 2048, 0.5, 0.0),
        "phi-2": (2560, 10240, 32, 32, 32, 51200, 2048, 0.4, 0.1),
    },
)

OLMO = files(
    "olmo",
    SHAPE + "tie_word_embeddings",
    {
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    {
        "olmo-1b-hf": (2048, 8192, 16, 16, 16, 50304, 2048, True),
        "olmo-7b-hf": (4096, 11008, 32, 32, 32, 50304, 2048, False),
    },
)

OLMO2 = files(
    "olmo2",
    SHAPE + "tie_word_embeddings",
    {
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
    },
    {
        "olmo-2-0425-1b": (2048, 8192, 16, 16, 16, 100352, 4096, False),
        "olmo-2-1124-7b": (4096, 11008, 32, 32, 32, 100352, 4096, False),
        "olmo-2-1124-13b": (5120, 13824, 40, 40, 40, 100352, 4096, False),
    },
)

STARCODER2_COMMON = {
    "embedding_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh",
    "mlp_type": "default",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "sliding_window": 4096,
    "use_bias": True,
}
STARCODER2 = files(
    "starcoder2",
    SHAPE + "rope_theta",
    STARCODER2_COMMON,
    {
        "starcoder2-3b": (3072, 12288, 30, 24, 2, 49152, 16384, 999999.4420358813),
        "starcoder2-7b": (4608, 18432, 32, 36, 4, 49152, 16384, 1000000),
    },
) | files(
    "starcoder2",
    SHAPE + "rope_theta tie_word_embeddings",
    STARCODER2_COMMON,
    {"starcoder2-15b": (6144, 24576, 40, 48, 4, 49152, 16384, 100000, False)},
)

OFFICIAL: dict[str, HF] = {
    **(GPT2 | GPT_NEO | GPTJ | GPT_NEOX | OPT | LLAMA | SMOLLM3 | MISTRAL | QWEN2 | QWEN3),
    **(GEMMA | GEMMA2 | GEMMA3 | PHI | OLMO | OLMO2 | STARCODER2),
}

TUNED = {
    "llama-3.1-8b-instruct": "llama-3.1-8b",
    "llama-3.2-1b-instruct": "llama-3.2-1b",
    "llama-3.2-3b-instruct": "llama-3.2-3b",
    "smollm2-135m-instruct": "smollm2-135m",
    "smollm2-360m-instruct": "smollm2-360m",
    "smollm2-1.7b-instruct": "smollm2-1.7b",
    "tinyllama-1.1b-chat-v1.0": "tinyllama-1.1b",
    "mistral-7b-instruct-v0.3": "mistral-7b-v0.3",
    "qwen2.5-0.5b-instruct": "qwen2.5-0.5b",
    "qwen2.5-3b-instruct": "qwen2.5-3b",
    "gemma-2-2b-it": "gemma-2-2b",
    "gemma-2-9b-it": "gemma-2-9b",
    "gemma-3-270m-it": "gemma-3-270m",
    "gemma-3-1b-it": "gemma-3-1b-pt",
}

# organisation -> how the names of its models begin
ORGANISATIONS = {
    "openai-community": ("gpt2",),
    "distilbert": ("distilgpt2",),
    "EleutherAI": ("gpt-neo-", "gpt-j-", "gpt-neox-", "pythia-"),
    "facebook": ("opt-",),
    "meta-llama": ("llama-", "meta-llama-3-"),
    "HuggingFaceTB": ("smollm2-", "smollm3-"),
    "TinyLlama": ("tinyllama-",),
    "mistralai": ("mistral-",),
    "Qwen": ("qwen2-", "qwen2.5-", "qwen3-"),
    "google": ("gemma-",),
    "microsoft": ("phi-",),
    "allenai": ("olmo-",),
    "bigcode": ("starcoder2-",),
}

# As the hub shows them, or the paper; tied weights count once.
PUBLISHED_COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
    "gpt-j-6b": 6_050_882_784,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,  # transformers' count: all that is published is rounded
    "llama-2-7b-hf": 6_738_415_616,
    "llama-2-13b-hf": 13_015_864_320,
    "llama-2-70b-hf": 68_976_648_192,
    "meta-llama-3-8b": 8_030_261_248,
    "meta-llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-0.6b": 596_049_920,
    "qwen3-0.6b-base": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-1.7b-base": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-4b-base": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-8b-base": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b-pt": 999_885_952,
    "phi-1": 1_418_270_720,
    "phi-1_5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "olmo-1b-hf": 1_176_764_416,
    "olmo-7b-hf": 6_888_095_744,
    "olmo-2-0425-1b": 1_484_916_736,
    "olmo-2-1124-7b": 7_298_617_344,
    "olmo-2-1124-13b": 13_716_198_400,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "starcoder2-15b": 15_957_889_024,
}


def test_every_model_is_checked() -> None:
    assert len(list_models()) == len(set(list_models()))
    assert {*OFFICIAL, *TUNED} == set(list_models())
    assert OFFICIAL.keys() == PUBLISHED_COUNTS.keys()


@pytest.mark.parametrize("name", OFFICIAL)
def test_config_is_the_official_one(name: str) -> None:
    official = OFFICIAL[name]
    assert get_config(name) == from_hf(family_of(official, name), official, name)


@pytest.mark.parametrize("name", TUNED)
def test_tuned_models_have_the_shape_of_their_base(name: str) -> None:
    assert get_config(name) == get_config(TUNED[name])


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_published_parameter_counts(name: str) -> None:
    model = eqx.filter_eval_shape(GPT.init, get_config(name), key=jax.random.key(0))
    assert count_params(model) == PUBLISHED_COUNTS[name]


def test_names_are_those_of_the_hub() -> None:
    assert list(HUB_IDS) == list_models()
    assert len(set(HUB_IDS.values())) == len(HUB_IDS)
    for name, hub_id in HUB_IDS.items():
        organisation, _, last = hub_id.partition("/")
        assert name.startswith(ORGANISATIONS[organisation]), hub_id
        assert last.lower().startswith(name)


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("gemma-3-1b-it", "google/gemma-3-1b-it"),
    ],
)
def test_a_name_is_found_on_the_hub(
    name: str, hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, file: str, **_: Any) -> str:
        assert (repo, file) == (hub_id, "config.json")
        path = tmp_path / "commit" / file
        path.parent.mkdir()
        path.write_text("{}")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    source = find(name)
    assert (source.kind, source.location, source.revision) == ("hub", hub_id, "commit")
