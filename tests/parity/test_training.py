"""A GPT-2 and its training written afresh in PyTorch, float32: the same losses, step by step."""

import dataclasses
import math
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from eqx_gpt import GPT, GPTConfig
from eqx_gpt.tree import named_arrays
from train.config import TrainConfig, model_config
from train.data import Windows
from train.loss import next_token_loss
from train.optimizer import make_optimizer
from train.presets import get_preset
from train.step import (
    Gradients,
    Recipe,
    StepMetrics,
    TrainState,
    add_gradients,
    apply_gradients,
    train_step,
)

N_TOKEN = 65  # as many as tiny Shakespeare has characters
PRESET = get_preset("shakespeare-char-cpu")
# Through all of the schedule: warm-up, decay, and the constant rate after it.
WITH_BIASES = dataclasses.replace(
    PRESET, bias=True, batch_size=4, gradient_accumulation_steps=3, learning_rate=3e-3,
    warmup_iters=5, lr_decay_iters=13, max_iters=17,
)  # fmt: skip


class TorchBlock(nn.Module):
    def __init__(self, width: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(width, eps=1e-5, bias=bias)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.norm2 = nn.LayerNorm(width, eps=1e-5, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, width = x.shape
        q, k, v = (
            part.view(batch, seq, self.n_head, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.n_head)
        future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TorchGPT2(nn.Module):
    def __init__(self, config: GPTConfig, bias: bool) -> None:
        super().__init__()
        width = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.block_size, width)
        blocks = [TorchBlock(width, config.n_head, bias) for _ in range(config.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-5, bias=bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.wte.weight.T

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        logits = self(windows[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def in_torch_names(model: GPT) -> dict[str, np.ndarray]:
    """Of a model or of its gradients: the stacked blocks one by one."""
    found = {}
    for name, x in named_arrays(model).items():
        if name.startswith("blocks."):
            own = name.removeprefix("blocks.").replace("attention.", "").replace("mlp.", "")
            found |= {f"blocks.{i}.{own}": np.array(layer) for i, layer in enumerate(x)}
        else:
            found[name] = np.array(x)
    return found


def torch_twin(model: GPT, bias: bool) -> TorchGPT2:
    twin = TorchGPT2(model.config, bias)
    weights = {name: torch.from_numpy(x) for name, x in in_torch_names(model).items()}
    twin.load_state_dict(weights, strict=True)
    return twin


def initial_model(config: TrainConfig) -> GPT:
    return GPT.init(model_config(config, N_TOKEN), key=jax.random.key(config.seed))


@cache
def data(config: TrainConfig) -> Windows:
    """Text with something to learn: each token is followed by one of three."""
    rng = np.random.default_rng(0)
    followers = rng.integers(0, N_TOKEN, (N_TOKEN, 3))
    tokens = np.zeros(20_000, np.uint16)
    for i, choice in enumerate(rng.integers(0, 3, len(tokens) - 1)):
        tokens[i + 1] = followers[tokens[i], choice]
    return Windows(tokens, config.block_size, config.seed)


def batch(config: TrainConfig, step: int) -> np.ndarray:
    """(micro-batches, sequences in one, block_size + 1)"""
    rows = data(config).batch(step, config.batch_size * config.gradient_accumulation_steps)
    return rows.reshape(config.gradient_accumulation_steps, config.batch_size, -1)


def torch_rate(config: TrainConfig, step: int) -> float:
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step > config.lr_decay_iters:
        return config.min_lr
    done = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    above = config.learning_rate - config.min_lr
    return config.min_lr + above * (1 + math.cos(math.pi * done)) / 2


@cache
def torch_training(config: TrainConfig, n_step: int) -> tuple[list[float], list[float], TorchGPT2]:
    """Losses, gradient norms, and the model in the end."""
    model = torch_twin(initial_model(config), config.bias)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    decayed = [layer.weight for layer in layers]
    decayed_ids = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in decayed_ids]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    losses, norms = [], []
    for step in range(n_step):
        for group in optimizer.param_groups:
            group["lr"] = torch_rate(config, step)
        optimizer.zero_grad()
        micro_batches = torch.from_numpy(batch(config, step)).long()
        total = 0.0
        for windows in micro_batches:
            loss = model.loss(windows) / len(micro_batches)
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    return losses, norms, model


def our_training(
    config: TrainConfig, n_step: int, accumulation: str
) -> tuple[list[float], list[float], GPT]:
    optimizer = make_optimizer(config)
    recipe = Recipe(optimizer, jnp.dtype(jnp.float32), jax.random.key(0))
    state = TrainState.init(initial_model(config), optimizer)
    losses, norms = [], []
    for step in range(n_step):
        windows = jnp.asarray(batch(config, step))
        metrics: StepMetrics
        if accumulation == "device":
            state, metrics = train_step((recipe, windows), state)
        else:
            gradients = Gradients.zero(state.model)
            for micro in windows:
                gradients = add_gradients((recipe, micro, state), gradients)
            state, metrics = apply_gradients(recipe, gradients, state)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return losses, norms, state.model


def largest_relative(found: list[float], expected: list[float]) -> float:
    return float(np.max(np.abs(np.array(found) / np.array(expected) - 1)))


def relative_norms(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict:
    assert found.keys() == expected.keys()
    return {
        name: np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])
        for name in expected
    }


def without_key_biases(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    def drop(name: str, x: np.ndarray) -> np.ndarray:
        return np.delete(x.reshape(3, -1), 1, axis=0) if name.endswith("qkv.bias") else x

    return {name: drop(name, x) for name, x in arrays.items()}


@pytest.mark.parametrize("config", [PRESET, WITH_BIASES], ids=["no_bias", "bias"])
def test_first_logits_and_gradients(config: TrainConfig) -> None:
    """1e-5 of the largest logit; 1e-5 of the norm of each array's gradient."""
    ours = initial_model(config)
    twin = torch_twin(ours, config.bias)
    windows = batch(config, 0)[0]
    torch_windows = torch.from_numpy(windows).long()
    expected = twin(torch_windows[:, :-1]).detach().numpy()
    logits = np.asarray(ours(windows[:, :-1]))
    difference = np.abs(logits - expected).max() / np.abs(expected).max()
    print(f"logits: {difference:.1e}")
    assert difference < 1e-5

    loss, grads = eqx.filter_value_and_grad(next_token_loss)(ours, jnp.asarray(windows))
    twin_loss = twin.loss(torch_windows)
    twin_loss.backward()
    assert abs(float(loss) / twin_loss.item() - 1) < 1e-6
    expected_grads = {name: p.grad.numpy() for name, p in twin.named_parameters()}
    errors = relative_norms(in_torch_names(grads), expected_grads)
    worst = max(errors, key=lambda name: errors[name])
    print(f"gradients: {errors[worst]:.1e} in {worst}")
    assert errors[worst] < 1e-5


def test_first_50_losses() -> None:
    """At the preset's own shape and schedule: 1e-4 relative."""
    shape = (PRESET.n_layer, PRESET.n_head, PRESET.n_embd, PRESET.block_size, PRESET.batch_size)
    assert shape == (4, 4, 128, 64, 12)
    assert (PRESET.learning_rate, PRESET.min_lr) == (1e-3, 1e-4)
    assert (PRESET.warmup_iters, PRESET.lr_decay_iters) == (100, 2000)
    losses, norms, _ = our_training(PRESET, 50, "device")
    expected, expected_norms, _ = torch_training(PRESET, 50)
    difference = largest_relative(losses, expected)
    print(f"50 losses: {difference:.1e}; from {losses[0]:.4f} to {losses[-1]:.4f}")
    assert difference < 1e-4
    assert largest_relative(norms, expected_norms) < 1e-3
    assert losses[-1] < losses[0] - 0.5  # it has learnt
    assert max(norms) > 1  # and been clipped


@pytest.mark.parametrize("accumulation", ["device", "host"])
def test_losses_with_accumulation_and_biases(accumulation: str) -> None:
    """Losses to 1e-4; the parameters in the end to 3e-4 of each array's norm.

    Not the biases of the keys: they shift all scores of a query alike, so their gradient is
    nothing but rounding errors, which Adam scales up to whole steps.
    """
    n_step = WITH_BIASES.max_iters
    losses, norms, model = our_training(WITH_BIASES, n_step, accumulation)
    expected, expected_norms, twin = torch_training(WITH_BIASES, n_step)
    difference = largest_relative(losses, expected)
    print(f"{n_step} losses, {accumulation}: {difference:.1e}")
    assert difference < 1e-4
    assert largest_relative(norms, expected_norms) < 1e-3
    assert max(norms) > 1
    parameters = {name: p.detach().numpy() for name, p in twin.named_parameters()}
    errors = relative_norms(
        without_key_biases(in_torch_names(model)), without_key_biases(parameters)
    )
    worst = max(errors, key=lambda name: errors[name])
    print(f"parameters: {errors[worst]:.1e} in {worst}")
    assert errors[worst] < 3e-4
