"""Names of published models, their configurations, and where their files are on the hub.

A config is what the model's own config.json says. The rows below give, in this order, layers,
heads, key-value heads where the family groups them, width, and inner width where it is not
4 times that.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from eqx_gpt.config import (
    AttentionConfig,
    GPTConfig,
    LayerConfig,
    Llama3Scaling,
    MLPConfig,
    NormConfig,
    PositionConfig,
    did_you_mean,
)

_RMS_5 = NormConfig("rmsnorm", eps=1e-5, bias=False)
_RMS_6 = NormConfig("rmsnorm", eps=1e-6, bias=False)
_GEMMA_NORM = NormConfig("rmsnorm", eps=1e-6, bias=False, scale="one_plus_weight")
_OLMO_NORM = NormConfig(bias=False, scale="none")


def _rope(theta: float, **fields: Any) -> PositionConfig:
    return PositionConfig("rope", rope_theta=theta, **fields)


def _plain(n_embd: int, activation: Any = "gelu_tanh") -> MLPConfig:
    return MLPConfig(activation=activation, n_inner=4 * n_embd)


def _gpt_neo(n_layer: int, n_head: int, n_embd: int) -> GPTConfig:
    attention = AttentionConfig(qkv_bias=False, scale=1.0)
    layers = (LayerConfig(), LayerConfig(window=256))
    return GPTConfig(2048, 50257, n_layer, n_head, n_embd, attention=attention, layers=layers)


def _gpt_neox(
    n_layer: int, n_head: int, n_embd: int, vocab_size: int = 50304, activation: str = "gelu"
) -> GPTConfig:
    return GPTConfig(
        *(2048, vocab_size, n_layer, n_head, n_embd),
        head="untied",
        residual="parallel",
        position=_rope(1e4, rope_dim=n_embd // n_head // 4),
        mlp=_plain(n_embd, activation),
    )


def _opt(n_layer: int, n_head: int, n_embd: int) -> GPTConfig:
    position, mlp = PositionConfig(offset=2), _plain(n_embd, "relu")
    return GPTConfig(2048, 50272, n_layer, n_head, n_embd, position=position, mlp=mlp)


def _phi(n_layer: int, n_head: int, n_kv_head: int | None, n_embd: int) -> GPTConfig:
    return GPTConfig(
        *(2048, 51200, n_layer, n_head, n_embd),
        head="untied",
        head_bias=True,
        residual="parallel_shared_norm",
        position=_rope(1e4, rope_dim=32),
        attention=AttentionConfig(n_kv_head),
        mlp=_plain(n_embd),
    )


def _starcoder2(
    n_layer: int, n_head: int, n_kv_head: int, n_embd: int, *, theta: float, head: Any = "tied"
) -> GPTConfig:
    return GPTConfig(
        *(16384, 49152, n_layer, n_head, n_embd),
        head=head,
        position=_rope(theta),
        attention=AttentionConfig(n_kv_head),
        mlp=_plain(n_embd),
        layers=(LayerConfig(window=4096),),
    )


def _llama(
    n_layer: int,
    n_head: int,
    n_kv_head: int,
    n_embd: int,
    n_inner: int,
    *,
    block_size: int,
    vocab_size: int,
    theta: float = 1e4,
    scaling: Llama3Scaling | None = None,
    norm: NormConfig = _RMS_5,
    activation: Any = "silu",
    qkv_bias: bool = False,
    attention: Mapping[str, Any] = MappingProxyType({}),
    head: Any = "untied",
    **fields: Any,
) -> GPTConfig:
    """Rotary and gated, as Llama and most families since; `attention` has what only some set."""
    return GPTConfig(
        *(block_size, vocab_size, n_layer, n_head, n_embd),
        head=head,
        norm=norm,
        position=_rope(theta, rope_scaling=scaling),
        attention=AttentionConfig(n_kv_head, qkv_bias=qkv_bias, out_bias=False, **attention),
        mlp=MLPConfig("gated", activation, n_inner, bias=False),
        **fields,
    )


def _stretched(factor: float) -> Llama3Scaling:
    return Llama3Scaling(factor, 1.0, 4.0, original_block_size=8192)


_llama2 = partial(_llama, block_size=4096, vocab_size=32000)
_llama3 = partial(_llama, block_size=8192, vocab_size=128256, theta=5e5)
_llama31 = partial(_llama3, block_size=131072, scaling=_stretched(8.0))
_smollm2 = partial(_llama, block_size=8192, vocab_size=49152, head="tied")
_mistral = partial(_llama, 32, 32, 8, 4096, 14336, block_size=32768)
_qwen2 = partial(_llama, vocab_size=152064, norm=_RMS_6, theta=1e6, qkv_bias=True)
_qwen2_small = partial(_qwen2, vocab_size=151936, head="tied")
_qwen3 = partial(
    _qwen2_small, block_size=40960, qkv_bias=False, attention={"head_dim": 128, "qk_norm": "head"}
)
_olmo = partial(_llama, block_size=2048, vocab_size=50304, norm=_OLMO_NORM)
_olmo2 = partial(
    _llama,
    block_size=4096,
    vocab_size=100352,
    norm=_RMS_6,
    theta=5e5,
    residual="post_norm",
    attention={"qk_norm": "all_heads"},
)
_gemma = partial(
    _llama, norm=_GEMMA_NORM, activation="gelu_tanh", head="tied", embedding_scale="sqrt_n_embd"
)
_gemma1 = partial(_gemma, block_size=8192, vocab_size=256000, attention={"head_dim": 256})


def _llama32(*shape: int, head_dim: int) -> GPTConfig:
    scaling, attention = _stretched(32.0), {"head_dim": head_dim}
    return _llama31(*shape, scaling=scaling, attention=attention, head="tied")


def _gemma2(*shape: int, head_dim: int = 256, scale: float = 256**-0.5) -> GPTConfig:
    return _gemma(
        *shape,
        block_size=8192,
        vocab_size=256000,
        residual="sandwich",
        attention={"head_dim": head_dim, "scale": scale, "softcap": 50.0},
        logit_softcap=30.0,
        layers=(LayerConfig(window=4096), LayerConfig()),
    )


def _gemma3(*shape: int) -> GPTConfig:
    return _gemma(
        *shape,
        block_size=32768,
        vocab_size=262144,
        residual="sandwich",
        theta=1e6,
        attention={"head_dim": 256, "scale": 256**-0.5, "qk_norm": "head"},
        layers=(*[LayerConfig(512, _rope(1e4))] * 5, LayerConfig()),
    )


_TINY_LLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
_BY_HUB_ID: dict[str, GPTConfig] = {
    # OpenAI 2019, "Language Models are Unsupervised Multitask Learners"
    "openai-community/gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "openai-community/gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "openai-community/gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "openai-community/gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    # Sanh et al. 2019, arXiv:1910.01108
    "distilbert/distilgpt2": GPTConfig(n_layer=6, n_head=12, n_embd=768),
    # Black et al. 2021
    "EleutherAI/gpt-neo-125m": _gpt_neo(12, 12, 768),
    "EleutherAI/gpt-neo-1.3B": _gpt_neo(24, 16, 2048),
    "EleutherAI/gpt-neo-2.7B": _gpt_neo(32, 20, 2560),
    # Wang and Komatsuzaki 2021
    "EleutherAI/gpt-j-6b": GPTConfig(
        *(2048, 50400, 28, 16, 4096),
        head="untied",
        head_bias=True,
        residual="parallel_shared_norm",
        position=_rope(1e4, rope_dim=64, rope_pairs="neighbours"),
        attention=AttentionConfig(qkv_bias=False, out_bias=False),
    ),
    # Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373
    "EleutherAI/gpt-neox-20b": _gpt_neox(44, 64, 6144, 50432, "gelu_tanh"),
    "EleutherAI/pythia-14m": _gpt_neox(6, 4, 128),
    "EleutherAI/pythia-31m": _gpt_neox(6, 8, 256),
    "EleutherAI/pythia-70m": _gpt_neox(6, 8, 512),
    "EleutherAI/pythia-160m": _gpt_neox(12, 12, 768),
    "EleutherAI/pythia-410m": _gpt_neox(24, 16, 1024),
    "EleutherAI/pythia-1b": _gpt_neox(16, 8, 2048),
    "EleutherAI/pythia-1.4b": _gpt_neox(24, 16, 2048),
    "EleutherAI/pythia-2.8b": _gpt_neox(32, 32, 2560),
    "EleutherAI/pythia-6.9b": _gpt_neox(32, 32, 4096, 50432),
    "EleutherAI/pythia-12b": _gpt_neox(36, 40, 5120, 50688),
    # Zhang et al. 2022, arXiv:2205.01068
    "facebook/opt-125m": _opt(12, 12, 768),
    "facebook/opt-1.3b": _opt(24, 32, 2048),
    "facebook/opt-2.7b": _opt(32, 32, 2560),
    "facebook/opt-6.7b": _opt(32, 32, 4096),
    "facebook/opt-13b": _opt(40, 40, 5120),
    "facebook/opt-30b": _opt(48, 56, 7168),
    "facebook/opt-66b": _opt(64, 72, 9216),
    # Touvron et al. 2023, arXiv:2307.09288; Llama Team 2024, arXiv:2407.21783
    "meta-llama/Llama-2-7b-hf": _llama2(32, 32, 32, 4096, 11008),
    "meta-llama/Llama-2-13b-hf": _llama2(40, 40, 40, 5120, 13824),
    "meta-llama/Llama-2-70b-hf": _llama2(80, 64, 8, 8192, 28672),
    "meta-llama/Meta-Llama-3-8B": _llama3(32, 32, 8, 4096, 14336),
    "meta-llama/Meta-Llama-3-70B": _llama3(80, 64, 8, 8192, 28672),
    "meta-llama/Llama-3.1-8B": _llama31(32, 32, 8, 4096, 14336),
    "meta-llama/Llama-3.1-70B": _llama31(80, 64, 8, 8192, 28672),
    "meta-llama/Llama-3.2-1B": _llama32(16, 32, 8, 2048, 8192, head_dim=64),
    "meta-llama/Llama-3.2-3B": _llama32(28, 24, 8, 3072, 8192, head_dim=128),
    # Ben Allal et al. 2025, arXiv:2502.02737; Bakouch et al. 2025
    "HuggingFaceTB/SmolLM2-135M": _smollm2(30, 9, 3, 576, 1536, theta=1e5),
    "HuggingFaceTB/SmolLM2-360M": _smollm2(32, 15, 5, 960, 2560, theta=1e5),
    "HuggingFaceTB/SmolLM2-1.7B": _smollm2(24, 32, 32, 2048, 8192, theta=1.3e5),
    "HuggingFaceTB/SmolLM3-3B": _llama(
        *(36, 16, 4, 2048, 11008),
        block_size=65536,
        vocab_size=128256,
        head="tied",
        norm=_RMS_6,
        theta=5e6,
        layers=(*[LayerConfig()] * 3, LayerConfig(position=PositionConfig("none"))),
    ),
    # Zhang et al. 2024, arXiv:2401.02385
    _TINY_LLAMA: _llama2(22, 32, 4, 2048, 5632, block_size=2048),
    # Jiang et al. 2023, arXiv:2310.06825
    "mistralai/Mistral-7B-v0.1": _mistral(vocab_size=32000, layers=(LayerConfig(window=4096),)),
    "mistralai/Mistral-7B-v0.3": _mistral(vocab_size=32768, theta=1e6),
    # Yang et al. 2024, arXiv:2407.10671 and 2412.15115; 2025, arXiv:2505.09388
    "Qwen/Qwen2-0.5B": _qwen2_small(24, 14, 2, 896, 4864, block_size=131072),
    "Qwen/Qwen2-1.5B": _qwen2_small(28, 12, 2, 1536, 8960, block_size=131072),
    "Qwen/Qwen2-7B": _qwen2(28, 28, 4, 3584, 18944, block_size=131072),
    "Qwen/Qwen2.5-0.5B": _qwen2_small(24, 14, 2, 896, 4864, block_size=32768),
    "Qwen/Qwen2.5-1.5B": _qwen2_small(28, 12, 2, 1536, 8960, block_size=131072),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2_small(28, 12, 2, 1536, 8960, block_size=32768),
    "Qwen/Qwen2.5-3B": _qwen2_small(36, 16, 2, 2048, 11008, block_size=32768),
    "Qwen/Qwen2.5-7B": _qwen2(28, 28, 4, 3584, 18944, block_size=131072),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2(28, 28, 4, 3584, 18944, block_size=32768),
    "Qwen/Qwen2.5-14B": _qwen2(48, 40, 8, 5120, 13824, block_size=131072, norm=_RMS_5),
    "Qwen/Qwen3-0.6B": _qwen3(28, 16, 8, 1024, 3072),
    "Qwen/Qwen3-0.6B-Base": _qwen3(28, 16, 8, 1024, 3072, block_size=32768),
    "Qwen/Qwen3-1.7B": _qwen3(28, 16, 8, 2048, 6144),
    "Qwen/Qwen3-1.7B-Base": _qwen3(28, 16, 8, 2048, 6144, block_size=32768),
    "Qwen/Qwen3-4B": _qwen3(36, 32, 8, 2560, 9728),
    "Qwen/Qwen3-4B-Base": _qwen3(36, 32, 8, 2560, 9728, block_size=32768),
    "Qwen/Qwen3-8B": _qwen3(36, 32, 8, 4096, 12288, head="untied"),
    "Qwen/Qwen3-8B-Base": _qwen3(36, 32, 8, 4096, 12288, head="untied", block_size=32768),
    # Gemma Team 2024, arXiv:2403.08295 and 2408.00118; 2025, arXiv:2503.19786
    "google/gemma-2b": _gemma1(18, 8, 1, 2048, 16384),
    "google/gemma-7b": _gemma1(28, 16, 16, 3072, 24576),
    "google/gemma-2-2b": _gemma2(26, 8, 4, 2304, 9216),
    "google/gemma-2-9b": _gemma2(42, 16, 8, 3584, 14336),
    "google/gemma-2-27b": _gemma2(46, 32, 16, 4608, 36864, head_dim=128, scale=144**-0.5),
    "google/gemma-3-270m": _gemma3(18, 4, 1, 640, 2048),
    "google/gemma-3-1b-pt": _gemma3(26, 4, 1, 1152, 6912),
    # Gunasekar et al. 2023, arXiv:2306.11644; Li et al. 2023, arXiv:2309.05463; Microsoft 2023
    "microsoft/phi-1": _phi(24, 32, None, 2048),
    "microsoft/phi-1_5": _phi(24, 32, None, 2048),
    "microsoft/phi-2": _phi(32, 32, 32, 2560),
    # Groeneveld et al. 2024, arXiv:2402.00838; OLMo Team 2024, arXiv:2501.00656
    "allenai/OLMo-1B-hf": _olmo(16, 16, 16, 2048, 8192, head="tied"),
    "allenai/OLMo-7B-hf": _olmo(32, 32, 32, 4096, 11008),
    "allenai/OLMo-2-0425-1B": _olmo2(16, 16, 16, 2048, 8192),
    "allenai/OLMo-2-1124-7B": _olmo2(32, 32, 32, 4096, 11008),
    "allenai/OLMo-2-1124-13B": _olmo2(40, 40, 40, 5120, 13824),
    # Lozhkov et al. 2024, arXiv:2402.19173
    "bigcode/starcoder2-3b": _starcoder2(30, 24, 2, 3072, theta=999_999.4420358813),
    "bigcode/starcoder2-7b": _starcoder2(32, 36, 4, 4608, theta=1e6),
    "bigcode/starcoder2-15b": _starcoder2(40, 48, 4, 6144, theta=1e5, head="untied"),
}

# Trained further, without a change of shape.
_TUNED = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "HuggingFaceTB/SmolLM2-360M",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "HuggingFaceTB/SmolLM2-1.7B",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINY_LLAMA,
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-3B-Instruct": "Qwen/Qwen2.5-3B",
    "google/gemma-2-2b-it": "google/gemma-2-2b",
    "google/gemma-2-9b-it": "google/gemma-2-9b",
    "google/gemma-3-270m-it": "google/gemma-3-270m",
    "google/gemma-3-1b-it": "google/gemma-3-1b-pt",
}
_ALL = {**_BY_HUB_ID, **{tuned: _BY_HUB_ID[base] for tuned, base in _TUNED.items()}}


def _name(hub_id: str) -> str:
    return "tinyllama-1.1b" if hub_id == _TINY_LLAMA else hub_id.partition("/")[2].lower()


HUB_IDS: Mapping[str, str] = MappingProxyType({_name(hub_id): hub_id for hub_id in _ALL})
"""name -> id on the hub, of which the name is the last part, in lower case."""


def list_models() -> list[str]:
    """Names that `get_config` and `weights.from_pretrained` know."""
    return list(HUB_IDS)


def get_config(name: str) -> GPTConfig:
    """The configuration of a published model. ValueError, with the near names, if unknown."""
    if name not in HUB_IDS:
        raise ValueError(f"unknown model {name!r}; {did_you_mean(name, HUB_IDS)}")
    return _ALL[HUB_IDS[name]]
