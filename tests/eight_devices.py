"""What tests/test_sharding.py asks of a process with eight devices; prints it as JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/eight_devices.py DIRECTORY ...
"""

import json
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reference

import weights.load
from eqx_gpt import GPT
from eqx_gpt.tree import named_arrays
from weights import WeightsError, from_pretrained

MESHES = {
    "data=8": ((8,), ("data",)),
    "fsdp=8": ((8,), ("fsdp",)),
    "tensor=8": ((8,), ("tensor",)),
    "data=2,fsdp=2,tensor=2": ((2, 2, 2), ("data", "fsdp", "tensor")),
    "tensor=4,fsdp=2": ((4, 2), ("tensor", "fsdp")),
    "tensor=3": ((3,), ("tensor",)),
    "fsdp=1": ((1,), ("fsdp",)),
}


def mesh_of(shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), axes)


def facts(directory: str, mesh: Mesh, plain: GPT) -> dict[str, Any]:
    """How a model lies on a mesh, and whether its arrays are still the same."""
    allocate, largest = weights.load.aligned_empty, 0

    def watched(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        nonlocal largest
        largest = max(largest, int(np.prod(shape)))
        return allocate(shape, dtype)

    weights.load.aligned_empty = watched
    try:
        model = from_pretrained(directory, mesh=mesh)
    finally:
        weights.load.aligned_empty = allocate
    ours, theirs = named_arrays(model), named_arrays(plain)
    return {
        "specs": {name: list(x.sharding.spec) for name, x in ours.items()},
        "devices": len(model.wte.weight.sharding.device_set),
        "shards": {name: list(x.addressable_shards[0].data.shape) for name, x in ours.items()},
        "equal": all(np.array_equal(np.asarray(x), theirs[name]) for name, x in ours.items()),
        "largest": largest,
    }


def error(directory: str, mesh: Mesh, plain: GPT) -> float:
    """The largest difference of a logit on a mesh from float64's, relative to the largest logit."""
    tokens = np.arange(8 * 11, dtype=np.int32).reshape(8, 11) * 5 % plain.config.vocab_size
    logits = np.asarray(eqx.filter_jit(from_pretrained(directory, mesh=mesh))(tokens))
    arrays = named_arrays(plain)
    expected = np.stack([reference.gpt(plain.config, arrays, row) for row in tokens])
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def refused(directory: str, mesh: Mesh) -> str:
    try:
        from_pretrained(directory, mesh=mesh)
    except WeightsError as error:
        return str(error)
    return ""


def main(directories: list[str]) -> None:
    meshes = {name: mesh_of(*mesh) for name, mesh in MESHES.items()}
    found: dict[str, Any] = {"facts": {}, "errors": {}}
    for directory in directories:
        kind, plain = Path(directory).name, from_pretrained(directory)
        found["facts"][kind] = {name: facts(directory, m, plain) for name, m in meshes.items()}
        found["errors"][kind] = error(directory, meshes["data=2,fsdp=2,tensor=2"], plain)
    explicit = jax.make_mesh((2, 4), ("tensor", "fsdp"))
    found["errors"]["explicit"] = error(directories[0], explicit, from_pretrained(directories[0]))
    found["refused"] = refused(directories[0], mesh_of((2,), ("model",)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
