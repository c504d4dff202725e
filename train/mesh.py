"""The mesh of devices that a run computes on, and where its arrays lie on it.

The model, its gradients and the optimizer's moments lie as `eqx_gpt.sharding` says, sequences are
split over data and fsdp. With one device there is no mesh, and all of this does nothing.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from eqx_gpt import sharding
from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT
from eqx_gpt.ops.meshed import BATCH, MESH_AXES, divides_heads, mesh_here
from eqx_gpt.tree import named_arrays, with_arrays
from train.config import TrainConfig
from train.data import Windows
from train.packing import Packed, PackedWindows, micro_batches

T = TypeVar("T")


def choose_mesh(
    shape: Mapping[str, int] | None, n_sequence: int, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """The mesh of a run whose steps take `n_sequence` sequences; None for one device.

    `shape` None chooses: data over the processes, fsdp over the devices of each, so that weights
    are gathered within a host and only gradients cross the network. A single process leaves those
    devices idle that would not divide the sequences; on a CPU, whose devices share one memory, it
    splits the data alone.

    **Raises:** ValueError if the shape is not that of the devices, or does not divide the
    sequences.
    """
    devices = jax.devices() if devices is None else devices
    n_process = len({device.process_index for device in devices})
    if shape is None:
        n = len(devices) // n_process
        if n_process == 1:
            n = max(d for d in range(1, n + 1) if n_sequence % d == 0)
            devices = devices[:n]
        within = n_process == 1 and devices[0].platform == "cpu"
        shape = {"data": n} if within else {"data": n_process, "fsdp": n}
    elif (n := math.prod(shape.values())) != len(devices):
        raise ValueError(
            f"mesh={described(shape)!r} is of {n} devices, here are {len(devices)}; give sizes "
            f"whose product is {len(devices)}, such as --mesh fsdp={len(devices)}, or leave it out"
        )
    n_part = math.prod(shape.get(axis, 1) for axis in BATCH)
    if n_sequence % n_part:
        raise ValueError(
            f"batch_size * gradient_accumulation_steps = {n_sequence} sequences are not split "
            f"evenly over mesh={described(shape)!r}, {n_part} parts; make them a multiple of "
            f"{n_part}, or give a --mesh whose data * fsdp divides {n_sequence}"
        )
    if len(devices) == 1:
        return None
    axes = tuple(axis for axis in MESH_AXES if axis in shape)
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape([shape[axis] for axis in axes]), axes)


def cores_mesh(config: TrainConfig) -> Mesh | None:
    """The mesh of a run here, where its devices are of one CPU."""
    if jax.default_backend() != "cpu" or jax.process_count() > 1 or config.mesh_shape is not None:
        return None
    return choose_mesh(None, config.global_batch_size)


def described(shape: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={n}" for axis, n in shape.items())


def n_parts(mesh: Mesh | None) -> int:
    """Into how many parts the mesh splits a batch."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in BATCH)


def describe_mesh(mesh: Mesh | None, model: GPTConfig) -> str:
    """For the header: the mesh, and what of the model it cannot split."""
    if mesh is None:
        return ""
    text = f", mesh {described(mesh.shape)}"
    if idle := jax.device_count() - mesh.size:
        text += f" ({idle} idle: they would not divide the sequences of a step)"
    if not divides_heads(mesh, model.n_head, model.n_kv_head):
        text += (
            f"; tensor={mesh.shape['tensor']} does not divide the model's {model.n_head} heads and "
            f"{model.n_kv_head} key-value heads, so each device along it attends for all"
        )
    return text


def around(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Within, what is computed is split over the mesh."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def placed(tree: T) -> T:
    """Inside jit: the models in a tree, whole or masked, split over the mesh here as they lie, and
    the other arrays whole on every device."""
    if mesh_here() is None:
        return tree

    def of_node(x: Any) -> Any:
        if isinstance(x, GPT):
            return sharding.placed(x)
        return lax.with_sharding_constraint(x, PartitionSpec())

    return jax.tree.map(of_node, tree, is_leaf=_is_model)


def with_shardings(shapes: T, mesh: Mesh | None) -> T:
    """Shapes, as `jax.eval_shape` gives them, with where `placed` puts the arrays."""
    if mesh is None:
        return shapes

    def of_array(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def of_node(x: Any) -> Any:
        if not isinstance(x, GPT):
            return of_array(x, NamedSharding(mesh, PartitionSpec()))
        where = sharding.shardings(x, mesh)
        arrays = {name: of_array(leaf, where[name]) for name, leaf in named_arrays(x).items()}
        return with_arrays(x, arrays)

    return jax.tree.map(of_node, shapes, is_leaf=_is_model)


def on_every_device(x: Array, mesh: Mesh | None) -> Array:
    return x if mesh is None else jax.device_put(x, NamedSharding(mesh, PartitionSpec()))


def where_windows_lie(mesh: Mesh | None) -> NamedSharding | None:
    """Those of a step, with the axes accum, micro, seq_plus_1."""
    if mesh is None:
        return None
    split = tuple(axis for axis in BATCH if axis in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(None, split or None))


def batch_on(
    mesh: Mesh | None, windows: Windows | PackedWindows, step: int, batch_size: int, n_micro: int
) -> Array | Packed:
    """A step's windows, with the axes accum, micro, seq_plus_1; a process reads its own alone.

    Where the mesh does not divide micro-batches, they get rows more, of weight 0.
    """
    where = where_windows_lie(mesh)
    if where is None:
        whole = windows.batch(step, batch_size)
        return jax.tree.map(jnp.asarray, micro_batches(whole, n_micro))
    real = batch_size // n_micro
    micro = -(-real // n_parts(mesh)) * n_parts(mesh)

    @cache
    def rows(first: int, end: int) -> PyTree[np.ndarray]:
        parts = []
        for start in range(0, batch_size, real):
            there = range(start + min(first, real - 1), start + min(end, real))
            part = windows.batch(step, batch_size, there)
            if micro > real:
                part = _filled(part, max(0, real - first), end - first, micro / real)
            parts.append(part)
        return jax.tree.map(lambda *x: np.stack(x), *parts)

    def of_device(index: Any) -> PyTree[np.ndarray]:
        first, end, _ = index[1].indices(micro)
        return rows(first, end)

    shape = (n_micro, micro)
    here = where.addressable_devices_indices_map(shape)
    example = of_device(next(iter(here.values())))
    leaves, structure = jax.tree.flatten(example)
    arrays = [
        jax.make_array_from_callback(
            (*shape, *leaf.shape[2:]),
            where,
            lambda index, i=i: jax.tree.leaves(of_device(index))[i],
        )
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, arrays)


def _filled(windows: Any, n_real: int, n: int, weight: float) -> Packed:
    """`windows`, their last repeated to `n`, of which `n_real` count, with a weight."""
    packed = windows if isinstance(windows, Packed) else Packed(windows)
    tokens, weights, starts = jax.tree.map(
        lambda x: np.concatenate([x, np.repeat(x[-1:], n - len(x), axis=0)]), packed
    )
    if weights is None:
        weights = np.ones((n, tokens.shape[1] - 1), np.float32)
    counted = (np.arange(n) < n_real)[:, None] * np.float32(weight)
    return Packed(tokens, weights * counted, starts)


def _is_model(x: Any) -> bool:
    return isinstance(x, GPT)
