"""What models and kernels do on a mesh of devices; where there is none, nothing.

The mesh is the one around the call, `with jax.set_mesh(mesh)`. Batches are split over its axes data
and fsdp, heads over tensor. Everything but what `by_part` computes is a number of one global array:
what stands here says only where the parts of it lie, which the compiler would otherwise have to
guess.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array

T = TypeVar("T")

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
WEIGHT = ("tensor", "fsdp")  # of maps as (out, in), of tables as (rows, d)

Axis = str | tuple[str, ...] | None


def mesh_here() -> AbstractMesh | None:
    """The mesh of several devices around the call, where the compiler splits arrays over it.

    None within `jax.shard_map`, and for axes that are not ours.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = mesh.axis_names and set(mesh.axis_names) <= set(MESH_AXES)
    if not ours or mesh.size == 1 or set(mesh.axis_types) != {AxisType.Auto}:
        return None
    return mesh


def fitting(
    mesh: jax.sharding.Mesh | AbstractMesh, shape: tuple[int, ...], axes: tuple[Axis, ...]
) -> PartitionSpec:
    """`axes` for the last dimensions of `shape`, as far as the mesh has them and they divide it."""
    axes = (None,) * (len(shape) - len(axes)) + axes[max(0, len(axes) - len(shape)) :]

    def kept(size: int, axis: Axis) -> Axis:
        names = (axis,) if isinstance(axis, str) else axis or ()
        names = tuple(name for name in names if name in mesh.shape)
        n = math.prod(mesh.shape[name] for name in names)
        return None if not names or size % n else names[0] if len(names) == 1 else names

    return PartitionSpec(*(kept(size, axis) for size, axis in zip(shape, axes, strict=True)))


def laid(x: Array, *axes: Axis) -> Array:
    """`x` with its last dimensions split over these axes, where they can be."""
    mesh = mesh_here()
    return x if mesh is None else lax.with_sharding_constraint(x, fitting(mesh, x.shape, axes))


def by_sequence(x: Array) -> Array:
    """`x`, `(*batch, seq, d)`, split by its first dimension, the sequences."""
    return x if x.ndim < 3 else laid(x, BATCH, *(None,) * (x.ndim - 1))


def by_heads(attend: Callable[..., T], q: Array, k: Array, *rest: Array | None) -> T:
    """`attend(q, k, *rest)`, of `(*batch, seq, head, head_dim)`, each device for its sequences and
    heads: of a loop over blocks the compiler would not know that they are independent.

    `rest` and the results are of that shape, or of the first of its dimensions.
    """
    mesh = mesh_here()
    if mesh is None:
        return attend(q, k, *rest)
    heads = "tensor" if divides_heads(mesh, q.shape[-2], k.shape[-2]) else None
    axes = (BATCH, *(None,) * (q.ndim - 3), heads, None) if q.ndim > 3 else (None, heads, None)

    def split(x: jax.ShapeDtypeStruct | Array | None) -> PartitionSpec | None:
        return None if x is None else fitting(mesh, x.shape, axes[: x.ndim])

    args = (q, k, *rest)
    results = jax.tree.map(split, jax.eval_shape(attend, *args))
    in_specs = tuple(map(split, args))
    return jax.shard_map(attend, in_specs=in_specs, out_specs=results, check_vma=False)(*args)


def by_part(compute: Callable[[Any, Any], T], whole: Any, rows: Any, *, axis: int) -> T:
    """`compute(whole, rows)`, whose floating-point results are means over `rows`, of which `axis`
    counts the sequences.

    On a mesh of data alone, each device computes from its own sequences what one device would,
    and the results are averaged once, at the end: nothing within it waits for another device.
    """
    mesh = mesh_here()
    if mesh is None or mesh.shape.get("data") != mesh.size:
        return compute(whole, rows)

    def of_part(whole: Any, rows: Any) -> T:
        def averaged(x: Array) -> Array:
            return lax.pmean(x, "data") if jnp.issubdtype(x.dtype, jnp.inexact) else x

        return jax.tree.map(averaged, compute(whole, rows))

    split = PartitionSpec(*(None,) * axis, "data")
    in_specs = (PartitionSpec(), split)
    return jax.shard_map(of_part, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)(
        whole, rows
    )


def here_of_parts() -> tuple[int | Array, int]:
    """Within `by_part`: the number of this part, and of how many. Elsewhere 0 of 1."""
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.manual_axes or set(mesh.axis_names) - set(mesh.manual_axes):
        return 0, 1
    return lax.axis_index("data"), mesh.shape["data"]


def divides_heads(mesh: jax.sharding.Mesh | AbstractMesh, n_head: int, n_kv_head: int) -> bool:
    """Are the heads split over the mesh? Otherwise each device along tensor attends for all."""
    n = mesh.shape.get("tensor", 1)
    return n_head % n == 0 and n_kv_head % n == 0
