"""Small models of every shape that the generic block takes. A new family adds its line here.

Sizes are distinct, and prime where they may be, so that no two axes can be taken for each other.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_gpt import (
    GPT,
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
from eqx_gpt.tree import named_arrays, roles, with_arrays

_NO_BIAS: dict[str, Any] = {
    "norm": NormConfig(bias=False),
    "attention": AttentionConfig(qkv_bias=False, out_bias=False),
    "mlp": MLPConfig(bias=False),
}

ARCHITECTURES: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(n_layer=2, n_head=3, n_embd=21, block_size=13, vocab_size=31),
    # The vocabulary is padded, as in the presets that train GPT-2.
    "no_bias": GPTConfig(
        n_layer=3, n_head=2, n_embd=22, block_size=17, vocab_size=37, n_token=29, **_NO_BIAS
    ),
    "llama": GPTConfig(
        n_layer=2,
        n_head=6,
        n_embd=23,
        block_size=13,
        vocab_size=41,
        head="untied",
        norm=NormConfig("rmsnorm", eps=1e-6, bias=False),
        position=PositionConfig("rope", rope_theta=500.0),
        attention=AttentionConfig(n_kv_head=2, head_dim=10, qkv_bias=False, out_bias=False),
        mlp=MLPConfig("gated", "silu", n_inner=19, bias=False),
    ),
    "multi_query": GPTConfig(
        n_layer=2,
        n_head=5,
        n_embd=35,
        block_size=11,
        vocab_size=43,
        attention=AttentionConfig(n_kv_head=1, out_bias=False),
        mlp=MLPConfig(activation="gelu", n_inner=29),
    ),
    # An odd layer at the end of the period; scores are not scaled.
    "gpt_neo": GPTConfig(
        n_layer=3,
        n_head=2,
        n_embd=22,
        block_size=13,
        vocab_size=31,
        attention=AttentionConfig(qkv_bias=False, scale=1.0),
        layers=(LayerConfig(), LayerConfig(window=3)),
    ),
    "gptj": GPTConfig(
        n_layer=2,
        n_head=3,
        n_embd=33,
        block_size=13,
        vocab_size=37,
        head="untied",
        head_bias=True,
        residual="parallel_shared_norm",
        position=PositionConfig("rope", rope_dim=6, rope_pairs="neighbours"),
        attention=AttentionConfig(qkv_bias=False, out_bias=False),
    ),
    "gpt_neox": GPTConfig(
        n_layer=3,
        n_head=3,
        n_embd=39,
        block_size=11,
        vocab_size=41,
        head="untied",
        residual="parallel",
        position=PositionConfig("rope", rope_dim=4),
        mlp=MLPConfig(activation="gelu", n_inner=47),
    ),
    "opt": GPTConfig(
        n_layer=2,
        n_head=5,
        n_embd=35,
        block_size=11,
        vocab_size=43,
        position=PositionConfig(offset=2),
        mlp=MLPConfig(activation="relu", n_inner=29),
    ),
    # Queries and keys normalised by layer norms with biases, before they are partly turned.
    "phi": GPTConfig(
        n_layer=2,
        n_head=4,
        n_embd=44,
        block_size=13,
        vocab_size=31,
        head="untied",
        head_bias=True,
        residual="parallel_shared_norm",
        position=PositionConfig("rope", rope_dim=4),
        attention=AttentionConfig(n_kv_head=2, qk_norm="head"),
    ),
    "gemma2": GPTConfig(
        n_layer=4,
        n_head=4,
        n_embd=23,
        block_size=13,
        vocab_size=41,
        logit_softcap=3.0,
        embedding_scale="sqrt_n_embd",
        residual="sandwich",
        norm=NormConfig("rmsnorm", eps=1e-6, bias=False, scale="one_plus_weight"),
        position=PositionConfig("rope"),
        attention=AttentionConfig(
            n_kv_head=2, head_dim=6, qkv_bias=False, out_bias=False, scale=0.3, softcap=2.0
        ),
        mlp=MLPConfig("gated", "gelu_tanh", n_inner=19, bias=False),
        layers=(LayerConfig(window=3), LayerConfig()),
    ),
    # A period of three in five layers, and two ropes.
    "gemma3": GPTConfig(
        n_layer=5,
        n_head=4,
        n_embd=23,
        block_size=13,
        vocab_size=41,
        embedding_scale="sqrt_n_embd",
        residual="sandwich",
        norm=NormConfig("rmsnorm", eps=1e-6, bias=False, scale="one_plus_weight"),
        position=PositionConfig("rope", rope_theta=700.0, rope_scaling=LinearScaling(3.0)),
        attention=AttentionConfig(
            n_kv_head=2, head_dim=6, qkv_bias=False, out_bias=False, qk_norm="head"
        ),
        mlp=MLPConfig("gated", "gelu_tanh", n_inner=19, bias=False),
        layers=(
            *[LayerConfig(window=4, position=PositionConfig("rope", rope_theta=50.0))] * 2,
            LayerConfig(),
        ),
    ),
    "olmo": GPTConfig(
        n_layer=2,
        n_head=3,
        n_embd=42,
        block_size=13,
        vocab_size=37,
        head="untied",
        norm=NormConfig(bias=False, scale="none"),
        position=PositionConfig(
            "rope",
            rope_theta=30.0,
            rope_scaling=Llama3Scaling(
                factor=5.0, low_freq_factor=1.0, high_freq_factor=3.0, original_block_size=31
            ),
        ),
        attention=AttentionConfig(qkv_bias=False, out_bias=False, clip_qkv=1.5),
        mlp=MLPConfig("gated", "silu", n_inner=29, bias=False),
    ),
    "olmo2": GPTConfig(
        n_layer=2,
        n_head=6,
        n_embd=23,
        block_size=13,
        vocab_size=41,
        residual="post_norm",
        norm=NormConfig("rmsnorm", bias=False),
        position=PositionConfig(
            "rope",
            rope_theta=40.0,
            rope_scaling=YarnScaling(
                factor=3.0, original_block_size=29, beta_fast=4.0, beta_slow=1.0, truncate=False
            ),
        ),
        attention=AttentionConfig(
            n_kv_head=2, head_dim=14, qkv_bias=False, out_bias=False, qk_norm="all_heads"
        ),
        mlp=MLPConfig("gated", "silu", n_inner=19, bias=False),
    ),
    "smollm3": GPTConfig(
        n_layer=3,
        n_head=4,
        n_embd=26,
        block_size=11,
        vocab_size=43,
        norm=NormConfig("rmsnorm", bias=False),
        position=PositionConfig("rope"),
        attention=AttentionConfig(n_kv_head=1, head_dim=6, qkv_bias=False, out_bias=False),
        mlp=MLPConfig("gated", "silu", n_inner=29, bias=False),
        layers=(LayerConfig(), LayerConfig(window=4, position=PositionConfig("none"))),
    ),
    "dropout": GPTConfig(
        n_layer=3,
        n_head=2,
        n_embd=14,
        block_size=13,
        vocab_size=31,
        dropout=0.3,
        mlp=MLPConfig("gated", "relu", n_inner=17),
    ),
}


def lively(config: GPTConfig) -> GPT:
    """A model in which every number matters: at its initialisation biases do nothing, norms
    little, and attention looks everywhere alike.

    Large matrices against small biases and embeddings make its greedy text varied: otherwise a
    final bias favours one token everywhere, and a tied head the token it has just read.
    """
    skeleton = eqx.filter_eval_shape(GPT.init, config, key=jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(name: str, role: str, shape: tuple[int, ...]) -> jax.Array:
        scale = role == "norm" and name.endswith("weight")
        mean = 1.0 if scale and config.norm.scale == "weight" else 0.0
        std = 0.5 if role == "weight" else 0.1
        return jnp.asarray(mean + std * rng.standard_normal(shape), jnp.float32)

    roles_of = jax.tree.leaves(roles(skeleton))
    arrays = named_arrays(skeleton).items()
    return with_arrays(
        skeleton,
        {name: draw(name, role, x.shape) for role, (name, x) in zip(roles_of, arrays, strict=True)},
    )


def random_tokens(config: GPTConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.real_vocab_size, shape, np.int32)
