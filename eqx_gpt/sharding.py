"""Where the leaves of a model lie on a mesh of devices: the one table."""

from functools import partial
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from eqx_gpt.ops.int8 import Int8
from eqx_gpt.ops.meshed import MESH_AXES, WEIGHT, fitting, mesh_here
from eqx_gpt.tree import Role, name_of, named_arrays, roles

Tree = TypeVar("Tree")
Axes = tuple[str | None, ...]
_AXES: dict[Role, Axes] = {
    "embedding": WEIGHT,
    "weight": WEIGHT,
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


def placed(model: Tree) -> Tree:
    """Inside jit, a model, or what has its leaves, split as `shardings` says over the mesh here."""
    return _on_mesh(lax.with_sharding_constraint, model)


def at_use(part: Tree) -> Tree:
    """A part of a model as its arithmetic wants it on the mesh here: whole over fsdp.

    Called on one layer at a time, so that no more is gathered at once. Its gradient is split
    again. Where there is no mesh this is nothing.
    """

    def gathered(x: Array, spec: PartitionSpec) -> Array:
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        return x if whole == spec else _gathered(x, spec, whole)

    return _on_mesh(gathered, part)


def regathers(primitive: Any, *_: Any, **__: Any) -> bool:
    """What `jax.checkpoint` may keep of a layer: all but what is gathered, or every device would
    hold the whole model between the forward and the backward pass."""
    return primitive.name != "sharding_constraint"


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: Array, stored: PartitionSpec, used: PartitionSpec) -> Array:
    return _gathered_forward(x, stored, used)[0]


def _gathered_forward(x: Array, stored: PartitionSpec, used: PartitionSpec) -> tuple[Array, None]:
    # Without the first constraint the compiler gathers the layers' stack, not the layer.
    x = lax.with_sharding_constraint(x, stored)
    return lax.with_sharding_constraint(x, used), None


def _gathered_backward(
    stored: PartitionSpec, used: PartitionSpec, _: None, g: Array
) -> tuple[Array]:
    return (lax.with_sharding_constraint(g, stored),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _on_mesh(fn: Any, tree: Tree) -> Tree:
    mesh = mesh_here()
    if mesh is None:
        return tree

    def of_leaf(path: tuple[Any, ...], role: Role, x: Any) -> Any:
        return x if isinstance(x, Int8) else fn(x, _spec(name_of(path), role, x, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, roles(tree), tree)


def _spec(name: str, role: Role, leaf: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    axes = (_AXES_OUT if name.split(".")[-2:][0] in _OUT else _AXES)[role]
    return fitting(mesh, leaf.shape, axes)
