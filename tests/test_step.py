"""The optimizer, its schedule and the train step."""

import dataclasses
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, lively, random_tokens

from eqx_gpt import GPT, GPTConfig
from eqx_gpt.tree import named_arrays
from train.config import TrainConfig, model_config
from train.loss import next_token_loss
from train.optimizer import make_optimizer
from train.packing import Packed
from train.schedules import learning_rate
from train.start import new_state
from train.step import (
    Gradients,
    Recipe,
    TrainState,
    add_gradients,
    apply_gradients,
    eval_step,
    train_step,
)

CONFIG = TrainConfig(
    n_layer=2, n_head=3, n_embd=24, block_size=11, vocab_size=37, bias=True,
    learning_rate=1e-2, warmup_iters=5, lr_decay_iters=23, max_iters=23, min_lr=1e-3,
)  # fmt: skip


def setup(config=CONFIG, dtype=jnp.float32):
    model = GPT.init(model_config(config, 37), key=jax.random.key(0))
    optimizer = make_optimizer(config)
    recipe = Recipe(optimizer, jnp.dtype(dtype), jax.random.key(1))
    return recipe, TrainState.init(model, optimizer)


def windows(*shape):
    return jax.random.randint(jax.random.key(2), (*shape, 12), 0, 37)


def copied(state):
    """A step donates its state."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), state)


def assert_close(a, b, rtol):
    for (name, x), y in zip(named_arrays(a).items(), named_arrays(b).values(), strict=True):
        scale = float(jnp.max(jnp.abs(y))) or 1.0
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_gradients_in_bfloat16_are_within_its_rounding(name):
    """Of every array, relative to its norm; float32's are those of float64 (test_model.py). On
    their way through these few layers numbers are rounded some ten times, each by up to 2**-9;
    the scales of gemma3's q and k, whose slopes nearly cancel, feel twice as much."""
    model = GPT.init(ARCHITECTURES[name], key=jax.random.key(0))
    tokens = jnp.asarray(random_tokens(model.config, 2, 12), jnp.int32)

    @eqx.filter_jit
    def gradients(model, dtype):
        return eqx.filter_grad(lambda model: next_token_loss(model, tokens, dtype=dtype))(model)

    low, exact = (named_arrays(gradients(model, d)) for d in (jnp.bfloat16, jnp.float32))
    for array, found in low.items():
        assert not jnp.array_equal(found, exact[array]), array
        error = jnp.linalg.norm(found - exact[array]) / jnp.linalg.norm(exact[array])
        bound = 20 if array.endswith(("q_norm.weight", "k_norm.weight")) else 10
        assert error < bound * 2.0**-9, array


@pytest.mark.parametrize(("warmup", "decay"), [(5, 23), (1, 7), (0, 13)])
def test_schedule_is_nanogpts(warmup, decay):
    config = dataclasses.replace(CONFIG, warmup_iters=warmup, lr_decay_iters=decay)
    schedule = learning_rate(config)
    for it in range(decay + 5):
        if it < warmup:
            expected = 1e-2 * (it + 1) / (warmup + 1)
        elif it > decay:
            expected = 1e-3
        else:
            ratio = (it - warmup) / (decay - warmup)
            expected = 1e-3 + 0.5 * (1 + math.cos(math.pi * ratio)) * (1e-2 - 1e-3)
        assert float(schedule(it)) == pytest.approx(expected, rel=1e-5), it


def test_schedule_without_decay_is_constant():
    schedule = learning_rate(dataclasses.replace(CONFIG, decay_lr=False))
    assert [float(schedule(it)) for it in (0, 3, 1000)] == pytest.approx([1e-2] * 3)


def test_only_matrices_and_embeddings_decay():
    optimizer = make_optimizer(CONFIG)
    model = GPT.init(model_config(CONFIG, 37), key=jax.random.key(0))
    model = jax.tree.map(jnp.ones_like, model)
    zero = jax.tree.map(jnp.zeros_like, model)
    updates, _ = optimizer.update(zero, optimizer.init(model), model)
    decayed = {name for name, update in named_arrays(updates).items() if (update != 0).any()}
    assert decayed == {
        "wte.weight", "wpe.weight", "blocks.attention.qkv.weight", "blocks.attention.out.weight",
        "blocks.mlp.up.weight", "blocks.mlp.down.weight",
    }  # fmt: skip
    expected = -1e-2 / 6 * 0.1  # first warm-up step, weight decay 0.1, of ones
    np.testing.assert_allclose(updates.wte.weight, expected, rtol=1e-5)


@pytest.mark.parametrize("grad_clip", [0.0, 0.5])
def test_clipping_is_by_the_global_norm(grad_clip):
    # With beta 0 and no decay the first update is lr * g / (|g| + eps): eps = 1e-8 shows the
    # gradient's scale only where it is tiny, so the gradient is.
    config = dataclasses.replace(
        CONFIG, grad_clip=grad_clip, beta1=0.0, beta2=0.0, weight_decay=0.0, decay_lr=False
    )
    optimizer = make_optimizer(config)
    model = GPT.init(model_config(config, 37), key=jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(model))
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-8), model)
    grads = eqx.tree_at(lambda m: m.wte.weight, grads, grads.wte.weight.at[0, 0].set(10.0))
    norm = math.sqrt(100 + (size - 1) * 1e-16)
    scale = min(1.0, grad_clip / norm) if grad_clip else 1.0
    updates, _ = optimizer.update(grads, optimizer.init(model), model)
    expected = -1e-2 * (1e-8 * scale) / (1e-8 * scale + 1e-8)
    np.testing.assert_allclose(updates.wpe.weight, expected, rtol=1e-4)


def test_loss_is_that_of_the_logits():
    recipe, state = setup()
    batch = windows(5)
    logits = state.model(batch[:, :-1])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = -np.take_along_axis(log_p, np.asarray(batch)[:, 1:, None], -1).mean()
    assert float(next_token_loss(state.model, batch)) == pytest.approx(expected, rel=1e-6)
    assert float(eval_step(state.model, batch, recipe.dtype)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["gptj", "gemma2"])
def test_loss_knows_the_whole_head(name):
    """With a bias of the head, and with a soft cap."""
    model = lively(ARCHITECTURES[name])
    batch = random_tokens(model.config, 3, 8)
    log_p = jax.nn.log_softmax(model(batch[:, :-1]))
    log_p = jnp.take_along_axis(log_p, jnp.asarray(batch)[:, 1:, None], axis=-1)
    expected = -float(jnp.mean(log_p))
    assert float(next_token_loss(model, jnp.asarray(batch))) == pytest.approx(expected, rel=1e-6)


def test_accumulation_is_one_large_batch_on_device_and_from_host():
    recipe, state = setup()
    batch = windows(6)
    whole, whole_metrics = train_step((recipe, batch[None]), copied(state))
    on_device, device_metrics = train_step((recipe, batch.reshape(3, 2, 12)), copied(state))
    gradients = Gradients.zero(state.model)
    for micro in batch.reshape(3, 2, 12):
        gradients = add_gradients((recipe, micro, state), gradients)
    from_host, host_metrics = apply_gradients(recipe, gradients, copied(state))
    for other, metrics in ((on_device, device_metrics), (from_host, host_metrics)):
        assert float(metrics.loss) == pytest.approx(float(whole_metrics.loss), rel=1e-6)
        assert float(metrics.grad_norm) == pytest.approx(float(whole_metrics.grad_norm), rel=1e-5)
        assert int(other.step) == 1
        # Adam's first update is the sign of the gradient wherever it is not tiny.
        moments = [s.opt_state[1][0].mu for s in (other, whole)]
        assert_close(*moments, rtol=1e-5)
    assert_close(from_host.model, on_device.model, rtol=1e-4)


def test_grad_norm_is_that_of_the_mean_gradient_before_clipping():
    recipe, state = setup()
    batch = windows(6)
    grads = eqx.filter_grad(next_token_loss)(state.model, batch)
    expected = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum())
                             for g in jax.tree.leaves(grads)))  # fmt: skip
    _, metrics = train_step((recipe, batch.reshape(2, 3, 12)), state)
    assert float(metrics.grad_norm) == pytest.approx(expected, rel=1e-5)


def test_training_learns():
    recipe, state = setup()
    batch = windows(1, 4)
    losses = []
    for _ in range(23):
        state, metrics = train_step((recipe, batch), state)
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(math.log(37), abs=0.1)
    assert losses[-1] < 2.0


def test_bfloat16_keeps_float32_parameters_and_follows_float32():
    batch = windows(1, 4)
    curves = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        recipe, state = setup(dtype=dtype)
        curve = []
        for _ in range(10):
            state, metrics = train_step((recipe, batch), state)
            curve.append(float(metrics.loss))
        curves[dtype] = np.array(curve)
        assert {x.dtype for x in jax.tree.leaves(state.model)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(curves[jnp.bfloat16], curves[jnp.float32], rtol=0.02)
    assert not np.array_equal(curves[jnp.bfloat16], curves[jnp.float32])


def test_dropout_differs_by_step_and_micro_batch_and_is_reproducible():
    config = dataclasses.replace(CONFIG, dropout=0.3, learning_rate=0.0, min_lr=0.0)
    same_twice = jnp.stack([windows(2)] * 2)

    def losses():
        recipe, state = setup(config)
        model_losses = []
        for _ in range(3):
            state, metrics = train_step((recipe, same_twice), state)
            model_losses.append(float(metrics.loss))
        return model_losses

    first = losses()
    assert len(set(first)) == 3
    assert first == losses()
    recipe, state = setup(config)
    one = add_gradients((recipe, same_twice[0], state), Gradients.zero(state.model))
    first_loss = float(one.loss)
    two = add_gradients((recipe, same_twice[1], state), one)
    assert float(two.loss) != pytest.approx(2 * first_loss, rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma3", "dropout"])
def test_gradients_have_no_empty_arrays(name, kind):
    """jaxlib 0.11 crashes at one that a part of a mesh (`by_part`) takes from outside."""
    config = ARCHITECTURES[name]
    model = eqx.filter_eval_shape(lambda: GPT.init(config, key=jax.random.key(0)))
    batch = Packed(jnp.zeros((2, config.block_size + 1), jnp.int32))
    if kind == "packed":
        shape = (2, config.block_size)
        batch = batch._replace(weights=jnp.ones(shape), starts=jnp.zeros(shape, jnp.int32))

    def gradients(model: GPT) -> GPT:
        key, dtype = jax.random.key(1), jnp.dtype(jnp.bfloat16)
        return eqx.filter_grad(lambda model: next_token_loss(model, batch, key=key, dtype=dtype))(
            model
        )

    text = jax.jit(gradients).lower(model).as_text()
    assert "tensor<" in text
    assert not re.search(r"tensor<(\d+x)*0x", text)


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        (jnp.zeros((1, 2, 12)), TypeError, "integers"),
        (jnp.zeros((2, 12), int), ValueError, "3 dimensions"),
        (jnp.zeros((1, 2, 13), int), ValueError, r"13 tokens exceed block_size \+ 1 = 12"),
        (jnp.zeros((1, 2, 1), int), ValueError, "nothing to predict"),
    ],
)
def test_a_wrong_batch_is_refused(batch, error, words):
    recipe, state = setup()
    with pytest.raises(error, match=words):
        train_step((recipe, batch), state)


def test_model_of_a_config():
    config = TrainConfig()
    model = model_config(config, 50257)
    assert (model.vocab_size, model.n_token) == (50304, 50257)
    assert not model.norm.bias
    assert model_config(dataclasses.replace(config, bias=True, vocab_size=50257), 50257) == (
        GPTConfig()
    )
    assert model_config(config, 65).vocab_size == 65
    with pytest.raises(ValueError, match="vocab_size=64 is less than the 65 tokens"):
        model_config(dataclasses.replace(config, vocab_size=64), 65)


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_remat_keeps_less(remat):
    """Of a deep narrow model: bytes that the compiled step holds beside its inputs."""
    config = TrainConfig(n_layer=6, n_head=2, n_embd=16, block_size=64)

    def held(remat):
        model_cfg = model_config(dataclasses.replace(config, remat=remat), 11)
        recipe = Recipe(make_optimizer(config), jnp.dtype("float32"), jax.random.key(0))
        state = new_state(config, model_cfg, jax.random.key(0), None)
        windows = jnp.zeros((1, 16, 65), jnp.int32)
        step = jax.jit(lambda state, windows: train_step((recipe, windows), state))
        return step.lower(state, windows).compile().memory_analysis().temp_size_in_bytes

    share = held(remat) / held("none")
    assert share < {"dots": 0.85, "block": 0.5}[remat]
