"""Small models of every shape that the generic block takes. A new family adds its line here.

Sizes are distinct, and prime where they may be, so that no two axes can be taken for each other.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_gpt import GPT, AttentionConfig, GPTConfig, MLPConfig, NormConfig, PositionConfig
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
        mean = 1.0 if role == "norm" and name.endswith("weight") else 0.0
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
