"""Tiny random models of every architecture, exported and run by llama.cpp in float32."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_cpp import Llama

import eqx_gpt
from eqx_gpt.config import (
    AttentionConfig,
    GPTConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    MLPConfig,
    NormConfig,
    PositionConfig,
    YarnScaling,
)
from eqx_gpt.ops import activation
from eqx_gpt.tree import named_arrays, with_arrays
from weights import from_pretrained, save_gguf
from weights.gguf_file import read_gguf
from weights.load import skeleton

SIZES = {"block_size": 31, "vocab_size": 71, "n_layer": 3, "n_head": 6, "n_embd": 24}
ROPE = PositionConfig("rope")
PART = PositionConfig("rope", rope_dim=2)
GATED = MLPConfig("gated", "silu", 37, bias=False)
NO_BIAS = AttentionConfig(n_kv_head=2, qkv_bias=False, out_bias=False)
LLAMA: dict[str, Any] = {
    **SIZES,
    "norm": NormConfig("rmsnorm", bias=False),
    "position": ROPE,
    "attention": NO_BIAS,
    "mlp": GATED,
}
GEMMA: dict[str, Any] = {
    **LLAMA,
    "norm": NormConfig("rmsnorm", eps=1e-6, bias=False, scale="one_plus_weight"),
    "mlp": dataclasses.replace(GATED, activation="gelu_tanh"),
    "embedding_scale": "sqrt_n_embd",
}


def attention(**changes: Any) -> dict[str, Any]:
    return {"attention": dataclasses.replace(NO_BIAS, **changes)}


def scaled(scaling: Any, theta: float = 10_000.0) -> dict[str, Any]:
    return {"position": PositionConfig("rope", rope_theta=theta, rope_scaling=scaling)}


LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
NO_ROPE = LayerConfig(position=PositionConfig("none"))
CONFIGS = {
    "gpt2": GPTConfig(**SIZES),
    "llama": GPTConfig(**LLAMA, head="untied"),
    "llama, wide heads": GPTConfig(**LLAMA | attention(head_dim=10)),
    "llama, biases": GPTConfig(
        **LLAMA | attention(qkv_bias=True, out_bias=True),
    ),
    "llama, linear": GPTConfig(**LLAMA | scaled(LinearScaling(4.0))),
    "llama, yarn": GPTConfig(**LLAMA | scaled(YarnScaling(4.0, 11))),
    "llama, llama3": GPTConfig(**LLAMA | scaled(LLAMA3, 5e5) | attention(head_dim=16)),
    "qwen2": GPTConfig(**LLAMA | attention(qkv_bias=True)),
    "qwen3": GPTConfig(**LLAMA | attention(qk_norm="head", head_dim=10)),
    "gemma": GPTConfig(**GEMMA | attention(n_kv_head=1, head_dim=10)),
    "gemma2": GPTConfig(
        **GEMMA | attention(head_dim=10, softcap=50.0),
        residual="sandwich",
        logit_softcap=30.0,
        layers=(LayerConfig(7), LayerConfig()),
    ),
    "gemma3": GPTConfig(
        **GEMMA | attention(head_dim=10, qk_norm="head") | scaled(LinearScaling(8.0), 1e6)
        | {"n_layer": 7},
        residual="sandwich",
        layers=(*[LayerConfig(7, ROPE)] * 5, LayerConfig()),
    ),
    "phi2": GPTConfig(
        **SIZES, position=PART, residual="parallel_shared_norm", head="untied", head_bias=True
    ),
    "gptneox": GPTConfig(**SIZES, position=PART, residual="parallel", head="untied"),
    "gptneox, in turn": GPTConfig(**SIZES, position=PART, head="untied"),
    "starcoder2": GPTConfig(**SIZES, position=ROPE, attention=AttentionConfig(n_kv_head=2)),
    "olmo": GPTConfig(
        **LLAMA | attention(clip_qkv=1.5)
        | {"norm": NormConfig("layernorm", bias=False, scale="none")}
    ),
    "olmo2": GPTConfig(**LLAMA | attention(qk_norm="all_heads"), residual="post_norm",
                       head="untied"),
    "smollm3": GPTConfig(**LLAMA | {"n_layer": 5}, layers=(*[LayerConfig()] * 3, NO_ROPE)),
}  # fmt: skip


def random_model(config: GPTConfig) -> eqx_gpt.GPT:
    """Every weight is random, biases and norms included, and large enough to matter."""
    model, random = skeleton(config, "float32"), np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> jnp.ndarray:
        small = name.startswith(("wte", "wpe")) or name.endswith("bias")
        norm = "norm" in name and name.endswith("weight")
        mean = float(norm and config.norm.scale == "weight")
        std = 0.2 if norm else 0.1 if small else 0.4
        return jnp.asarray(random.normal(mean, std, shape), jnp.float32)

    return with_arrays(
        model, {name: draw(name, x.shape) for name, x in named_arrays(model).items()}
    )


def llama_cpp_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    n = len(tokens)
    llm = Llama(
        str(path), logits_all=True, n_ctx=n, n_batch=n, type_k=0, type_v=0, flash_attn=False,
        n_threads=1, verbose=False,
    )  # fmt: skip
    llm.eval(tokens.tolist())
    logits = np.array(llm.scores[:n])
    llm.close()
    return logits


def table_gelu(x: jax.Array) -> jax.Array:
    """GELU as llama.cpp looks it up (ggml-cpu/vec.h): of float16, to float16."""
    rounded = x.astype(jnp.float16).astype(jnp.float32)
    y = jax.nn.gelu(rounded, approximate=True).astype(jnp.float16).astype(jnp.float32)
    return jnp.where(x <= -10, 0.0, jnp.where(x >= 10, x, y))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As float32 agrees; where there is a GELU, some arguments fall to the other side of a step
    of llama.cpp's table."""
    jax.clear_caches()  # of programs with the plain one
    monkeypatch.setitem(activation._FORMULAS, "gelu_tanh", table_gelu)
    config = CONFIGS[name]
    model, path = random_model(config), tmp_path / "model.gguf"
    save_gguf(model, path, dtype="F32")
    assert read_gguf(path).metadata["general.architecture"] == name.split(",")[0]
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, config.block_size)
    expected = llama_cpp_logits(path, tokens)
    found = np.asarray(model(jnp.asarray(tokens)))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{name}: {difference:.1e} of the largest logit")
    assert difference <= (3e-4 if config.mlp.activation == "gelu_tanh" else 1e-5)
    again = from_pretrained(path)
    assert np.array_equal(np.asarray(again(jnp.asarray(tokens))), found)


@pytest.mark.parametrize(("dtype", "bound"), [("F16", 5e-3), ("BF16", 5e-2)])
def test_half_precision(dtype: Any, bound: float, tmp_path: Path) -> None:
    """Of numbers that both types hold. llama.cpp rounds the other factor of each product too, to
    2^-11 or 2^-8 of it."""
    config = CONFIGS["llama"]
    model = random_model(config)
    rounded = {n: jnp.round(x * 64) / 64 for n, x in named_arrays(model).items()}
    model, path = with_arrays(model, rounded), tmp_path / "model.gguf"
    save_gguf(model, path, dtype=dtype)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, config.block_size)
    found, expected = np.asarray(model(jnp.asarray(tokens))), llama_cpp_logits(path, tokens)
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
    assert np.array_equal(np.asarray(from_pretrained(path)(jnp.asarray(tokens))), found)
