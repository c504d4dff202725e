"""Where the leaves of a model lie on a mesh of devices: the one table."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from eqx_gpt.tree import Role, named_arrays, roles

MESH_AXES = ("data", "fsdp", "tensor")

Axes = tuple[str | None, ...]
_AXES: dict[Role, Axes] = {
    "embedding": ("tensor", "fsdp"),
    "weight": ("tensor", "fsdp"),
    "bias": ("tensor",),
    "lora": (),
    "norm": (),
}
# The maps that write to the residual stream.
_AXES_OUT: dict[Role, Axes] = {"weight": ("fsdp", "tensor"), "bias": ()}
_OUT = ("out", "down")


def shardings(model: PyTree, mesh: Mesh) -> dict[str, NamedSharding]:
    """How each array of a model is split over a mesh, by its dotted name (`named_arrays`).

    | leaf | its axes | are split over |
    | --- | --- | --- |
    | embeddings | rows, d_model | tensor, fsdp |
    | weights of `qkv`, `up`, `gate`, `head` | out, in | tensor, fsdp |
    | weights of `out` and `down` | out, in | fsdp, tensor |
    | biases of `qkv`, `up`, `gate`, `head` | out | tensor |
    | other biases, norms, adapters | | nothing |

    Nothing is split over `data`, and no stacked leaf by layers. Where the mesh lacks an axis, or
    where its size does not divide that of the leaf's, the leaf is not split.

    **Arguments:**

    - `model`: of arrays, or of their shapes alone.
    - `mesh`: with any of the axes data, fsdp and tensor, in any order.

    **Raises:** ValueError if the mesh has another axis.
    """
    for axis in mesh.axis_names:
        if axis not in MESH_AXES:
            raise ValueError(f"the mesh has an axis {axis!r}, expected {', '.join(MESH_AXES)}")
    # The compiler chooses how activations are split, also where the mesh leaves that to types.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    leaves = zip(jax.tree.leaves(roles(model)), named_arrays(model).items(), strict=True)
    return {name: NamedSharding(mesh, _spec(name, role, x, mesh)) for role, (name, x) in leaves}


def _spec(name: str, role: Role, leaf: Any, mesh: Mesh) -> PartitionSpec:
    axes = (_AXES_OUT if name.split(".")[-2] in _OUT else _AXES)[role]
    stacked = (None,) * (leaf.ndim - len(axes))
    sizes = leaf.shape[len(stacked) :]
    kept = [
        axis if axis is not None and size % mesh.shape.get(axis, size + 1) == 0 else None
        for axis, size in zip(axes, sizes, strict=True)
    ]
    return PartitionSpec(*stacked, *kept)
