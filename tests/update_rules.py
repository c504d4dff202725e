"""What the tests of update rules share: a small model, its gradients, and 20 steps of ours."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqx_gpt import GPT
from eqx_gpt.tree import named_arrays, with_arrays
from train.config import TrainConfig, model_config
from train.optimizer import make_optimizer

STEPS = 20
CONFIG = TrainConfig(
    n_layer=3, n_head=2, n_kv_head=1, n_embd=14, block_size=7, vocab_size=13, bias=True,
    learning_rate=3e-3, min_lr=1e-4, warmup_iters=5, lr_decay_iters=17, max_iters=STEPS,
    weight_decay=0.2, grad_clip=0.0, beta1=0.9, beta2=0.97,
)  # fmt: skip
MATRICES = {
    "blocks.attention.qkv.weight", "blocks.attention.out.weight", "blocks.mlp.up.weight",
    "blocks.mlp.down.weight",
}  # fmt: skip
DECAYS = MATRICES | {"wte.weight", "wpe.weight"}


def new_model(config=CONFIG):
    return GPT.init(model_config(config, 13), key=jax.random.key(0))


@cache
def _names_and_shapes():
    return {name: x.shape for name, x in named_arrays(new_model()).items()}


def gradients(step):
    """Of one step: sizes differ by a factor of thousand between arrays and between steps."""
    rng = np.random.default_rng(step)
    return {
        name: rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 0)
        for name, shape in _names_and_shapes().items()
    }


def trained(config, steps=STEPS):
    """The arrays after so many steps of ours."""
    model, optimizer = new_model(config), make_optimizer(config)
    state = optimizer.init(model)

    @jax.jit
    def step(model, state, grads):
        updates, state = optimizer.update(grads, state, model)
        return optax.apply_updates(model, updates), state

    for i in range(steps):
        grads = {name: jnp.asarray(g, jnp.float32) for name, g in gradients(i).items()}
        model, state = step(model, state, with_arrays(model, grads))
    return {name: np.asarray(x, np.float64) for name, x in named_arrays(model).items()}


def rate(config, step):
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    ratio = min(1, (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters))
    spread = config.learning_rate - config.min_lr
    return config.min_lr + spread * (1 + math.cos(math.pi * ratio)) / 2


def assert_close(found, expected, start, rtol):
    """To `rtol` of how far the arrays have moved, and the rounding of each of the steps."""
    for name, x in named_arrays(start).items():
        moved = np.abs(expected[name] - np.asarray(x, np.float64)).max()
        assert moved > 1e-3, name
        atol = rtol * moved + STEPS * 2**-24 * np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)
