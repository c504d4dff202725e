"""What tests/test_meshes.py asks of a process with eight devices; prints it as JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/eight_devices_train.py DIRECTORY
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eqx_gpt.config import GPTConfig
from eqx_gpt.ops import head_tiles
from eqx_gpt.tree import named_arrays
from scripts.benchmarks.meshes import MODELS, SEQ, Run, difference, random_windows, run
from scripts.benchmarks.meshes import train_config as config_of
from train.checkpoint import Checkpoints
from train.data import Windows
from train.evaluate import sampled_loss
from train.manifest import BEGINS, LEARNT
from train.mesh import around, batch_on, choose_mesh, on_every_device, with_shardings
from train.optimizer import make_optimizer
from train.packing import PackedWindows
from train.start import new_state, skeleton
from train.step import Recipe, TrainState, train_step

MESHES: dict[str, dict[str, int]] = {
    "fsdp=8": {"fsdp": 8},
    "tensor=8": {"tensor": 8},
    "data=8": {"data": 8},
    "data=2,fsdp=2,tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}
STEPS = 20


def packed_windows() -> PackedWindows:
    """Conversations of which the later half is learnt; that share differs by window."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 23, 997)
    tokens = np.concatenate([(np.arange(n) * rng.integers(1, 5)) % 89 for n in lengths])
    flags = np.zeros(len(tokens), np.uint8)
    begins = np.cumsum(lengths) - lengths
    for begin, n in zip(begins, lengths, strict=True):
        flags[begin + n // 2 : begin + n] = LEARNT
    flags[begins] = BEGINS
    return PackedWindows(tokens.astype(np.uint16), flags, SEQ, seed=7)


def resumed(
    directory: Path,
    alone: Run,
    windows: Windows,
    first: dict[str, int] | None,
    then: dict[str, int] | None,
) -> float:
    """Stopped in the middle on one mesh and continued on another: the difference to one device."""
    model, half = MODELS["gpt2"], STEPS // 2
    before = run(model, first, windows, steps=range(half))
    with around(before.mesh):
        checkpoints = Checkpoints(directory)
        checkpoints.save(before.state, half, {})
        checkpoints.close()

    def restored(mesh: Any) -> TrainState:
        shapes = with_shardings(skeleton(config_of(), model, jnp.float32), mesh)
        checkpoints = Checkpoints(directory)
        state, _ = checkpoints.restore(shapes)
        checkpoints.close()
        assert int(state.step) == half
        return state

    after = run(model, then, windows, steps=range(half, STEPS), start=restored)
    whole = Run(before.losses + after.losses, before.read + after.read, after.state, after.mesh)
    return difference(alone, whole)


def where(result: Run) -> dict[str, list[list[int]]]:
    """The shapes of the weights' and moments' shards, before the first step and after the last."""
    moments = result.state.opt_state[1][0].mu
    return {
        name: [list(x.addressable_shards[0].data.shape), list(m.addressable_shards[0].data.shape)]
        for (name, x), m in zip(
            named_arrays(result.state.params).items(),
            named_arrays(moments).values(),
            strict=True,
        )
    }


def evaluated(shape: dict[str, int] | None, windows: Windows | PackedWindows, rows: int) -> float:
    """The loss of two batches of `rows` sequences, which eight devices need not divide."""
    config = dataclasses.replace(config_of(), batch_size=rows * 8)
    sizes = {"data": 1} if shape is None else shape
    n = int(np.prod(list(sizes.values())))
    mesh = choose_mesh(sizes, config.global_batch_size, jax.devices()[:n])
    with around(mesh):
        model = new_state(config, MODELS["gpt2"], jax.random.key(3), None).model
        return sampled_loss(
            model, windows, batch_size=rows, n_batch=2, micro_batch_size=8, dtype=jnp.float32,
            progress=lambda done, total: None, mesh=mesh,
        )  # fmt: skip


def program(model: GPTConfig, shape: dict[str, int], windows: Windows) -> dict[str, Any]:
    """The collectives of a step's compiled program: how often each kind gives which shape."""
    config = config_of()
    mesh = choose_mesh(shape, config.global_batch_size)
    with around(mesh):
        state = new_state(config, model, jax.random.key(0), None)
        key = on_every_device(jax.random.key(1), mesh)
        recipe = Recipe(make_optimizer(config), jnp.dtype(jnp.float32), key)
        batch = batch_on(mesh, windows, 0, config.global_batch_size, 1)
        step = jax.jit(lambda state, batch: train_step((recipe, batch), state))
        text = step.lower(state, batch).compile().as_text()
    found: dict[str, list[str]] = {}
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for result, kind in re.findall(rf" = (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text):
        found.setdefault(kind, []).extend(re.findall(r"\w+\[[\d,]*\]", result))
    return found


def memory_of_init(shape: dict[str, int]) -> dict[str, int]:
    """Bytes that making the first state takes on one device, and what its arrays are in all."""
    config, model = config_of(), dataclasses.replace(MODELS["gpt2"], n_embd=256)
    mesh = choose_mesh(shape, config.global_batch_size)
    with around(mesh):
        make = jax.jit(lambda key: eqx.filter(new_state(config, model, key, None), eqx.is_array))
        used = make.lower(jax.random.key(0)).compile().memory_analysis()
    whole = jax.tree.leaves(skeleton(config, model, jnp.float32))
    return {
        "device": used.temp_size_in_bytes + used.output_size_in_bytes,
        "whole": sum(x.size * x.dtype.itemsize for x in whole),
    }


def main(directory: Path) -> None:
    windows = random_windows()
    found: dict[str, Any] = {"programs": {}, "apart": {}, "resumed": {}}
    for name in ("fsdp=8", "tensor=8", "data=8"):
        found["programs"][name] = program(MODELS["gpt2"], MESHES[name], windows)
    found["init"] = memory_of_init(MESHES["fsdp=8"])
    # Compiling takes the time here.
    jax.config.update("jax_disable_most_optimizations", True)
    alone = run(MODELS["gpt2"], None, windows, steps=range(STEPS))
    tile, head_tiles._TILE = head_tiles._TILE, 32
    assert head_tiles.has_tiles(MODELS["gpt2"].vocab_size)
    on_mesh = run(MODELS["gpt2"], MESHES["fsdp=8"], windows, steps=range(STEPS))
    head_tiles._TILE = tile
    found["apart"]["gpt2, on the mesh with tiles of its vocabulary"] = difference(alone, on_mesh)
    found["where"] = where(on_mesh)
    # Twelve heads, four key-value heads, and only adapters learn, of parts of documents.
    config = config_of(lora_rank=3, init_from="another")
    few = {"windows": packed_windows(), "steps": range(5), "config": config}
    runs = [run(MODELS["rotary"], shape, **few) for shape in (None, MESHES["tensor=8"])]
    found["apart"]["packed, with adapters, heads not divided"] = difference(*runs)
    # Each device draws what its rows would be given by one alone, of every micro-batch.
    dropping = dataclasses.replace(MODELS["rotary"], dropout=0.1)
    few = few | {"config": config_of(micro_batch_size=8)}
    runs = [run(dropping, shape, **few) for shape in (None, MESHES["data=8"])]
    found["apart"]["data alone, packed, with dropout, in micro-batches"] = difference(*runs)
    found["evaluated"] = [evaluated(shape, windows, 5) for shape in (None, MESHES["fsdp=8"])]
    eight, two = MESHES["data=2,fsdp=2,tensor=2"], {"fsdp": 2}
    found["resumed"]["1 -> 8"] = resumed(directory / "up", alone, windows, None, eight)
    found["resumed"]["8 -> 2"] = resumed(directory / "down", alone, windows, eight, two)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
