"""One device against every mesh of eight: python scripts/benchmarks/meshes.py [--steps 20].

The devices are parts of this CPU. For a model of GPT-2's shape and a rotary one with grouped heads,
float32, the same data: how far the losses are from those of one device, relatively, and whether
every step read the same windows. Prints a table, and as its last line JSON.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from eqx_gpt.config import AttentionConfig, GPTConfig, MLPConfig, NormConfig, PositionConfig
from train.config import TrainConfig
from train.data import Windows
from train.devices import Execution
from train.mesh import around, batch_on, choose_mesh, described, n_parts, on_every_device
from train.optimizer import make_optimizer
from train.packing import PackedWindows
from train.start import new_state
from train.step import Recipe, TrainState, train_step

VOCAB, SEQ, N_SEQUENCE = 296, 37, 24
SHARED: dict[str, Any] = {"block_size": SEQ, "vocab_size": VOCAB, "n_layer": 2, "n_embd": 56}
MODELS = {
    "gpt2": GPTConfig(**SHARED, n_head=8),
    "rotary": GPTConfig(
        **SHARED,
        n_head=12,
        head="untied",
        norm=NormConfig("rmsnorm", bias=False),
        position=PositionConfig("rope"),
        attention=AttentionConfig(n_kv_head=4, head_dim=6, qkv_bias=False, out_bias=False),
        mlp=MLPConfig("gated", "silu", n_inner=88, bias=False),
    ),
}


def shapes_of(n: int) -> Iterator[dict[str, int]]:
    """Every mesh of `n` devices."""
    for data in range(1, n + 1):
        for fsdp in range(1, n // data + 1):
            if n % (data * fsdp) == 0:
                yield {"data": data, "fsdp": fsdp, "tensor": n // (data * fsdp)}


def train_config(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "batch_size": 3, "gradient_accumulation_steps": N_SEQUENCE // 3, "block_size": SEQ,
        "learning_rate": 3e-3, "warmup_iters": 5, "max_iters": 20, "lr_decay_iters": 20,
        "precision": "float32",
    }  # fmt: skip
    return dataclasses.replace(TrainConfig(), **{**fields, **changes})


def random_windows() -> Windows:
    """Tokens that have something to learn: each depends on the one before."""
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 5, 40_000)
    return Windows((np.cumsum(steps * steps) % VOCAB).astype(np.uint16), SEQ, seed=1337)


@dataclasses.dataclass
class Run:
    """The losses of a run, what it read in each step, and its last state."""

    losses: list[float]
    read: list[np.ndarray]
    state: TrainState
    mesh: Mesh | None


def run(
    model: GPTConfig,
    shape: dict[str, int] | None,
    windows: Windows | PackedWindows,
    *,
    steps: range,
    config: TrainConfig | None = None,
    start: Callable[[Mesh | None], TrainState] | None = None,
) -> Run:
    """Train on a mesh of that shape, None is one device; from a new state or from `start(mesh)`."""
    config = train_config() if config is None else config
    shape = {"data": 1} if shape is None else shape
    devices = jax.devices()[: math.prod(shape.values())]
    mesh = choose_mesh(shape, config.global_batch_size, devices)
    key_model, key_steps = jax.random.split(jax.random.key(config.seed))
    losses, read = [], []
    with around(mesh):
        execution = Execution.choose(config, model, 10**5, "cpu", n_parts=n_parts(mesh))
        recipe = Recipe(_optimizer(config), jnp.float32, on_every_device(key_steps, mesh))
        make = partial(new_state, config, model, key_model, None)
        state = make() if start is None else start(mesh)
        for step in steps:
            batch = batch_on(mesh, windows, step, config.global_batch_size, execution.n_micro)
            tokens = np.asarray(jax.tree.leaves(batch)[0])
            read.append(tokens.reshape(-1, tokens.shape[-1]))
            state, metrics = train_step((recipe, batch), state)
            losses.append(float(metrics.loss))
    return Run(losses, read, state, mesh)


@cache
def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The same object for the same config, so that what is compiled for it is found again."""
    return make_optimizer(config)


def difference(one: Run, other: Run) -> float:
    """The largest relative one of two runs' losses; inf if they did not read the same."""
    if not all(np.array_equal(a, b) for a, b in zip(one.read, other.read, strict=True)):
        return float("inf")
    a, b = np.array(one.losses), np.array(other.losses)
    return float(np.max(np.abs(a - b) / a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    steps = range(arguments.steps)
    windows, found = random_windows(), {}
    for name, model in ((name, MODELS[name]) for name in arguments.models):
        one = run(model, None, windows, steps=steps)
        print(f"{name}: one device, loss {one.losses[0]:.4f} to {one.losses[-1]:.4f}", flush=True)
        for shape in shapes_of(8):
            apart = difference(one, run(model, shape, windows, steps=steps))
            print(f"  {described(shape):24}  {apart:.1e}", flush=True)
            found[f"{name} {described(shape)}"] = apart
    print(json.dumps({"largest": max(found.values()), "of": found}))


if __name__ == "__main__":
    main()
