"""What training left in a run directory: its config, and the arrays of a checkpoint.

run.json                      {"format_version": 1, "model": GPTConfig.to_dict(), "lora": null or
                              the fields of LoRAConfig, "data": the manifest of its dataset, ...}
tokenizer_spec.json           the spec of its tokenizer
checkpoints/<step>/model/     an Orbax item: dotted name -> array (`eqx_gpt.tree.named_arrays`)
checkpoints/<step>/average/   the same, where the run averages its weights
best/<step>/model/            the same, where the run kept the best
base/0/model/                 the same, of frozen parts: no other checkpoint has them
.../<step>/checksums/metadata JSON: {"model": {name: [dtype, a number of `eqx_gpt.checksum`]}}
"""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from eqx_gpt.checksum import checksums
from eqx_gpt.config import GPTConfig, LoRAConfig
from eqx_gpt.record import conflict
from eqx_gpt.tokenizer import Tokenizer, fingerprint
from eqx_gpt.unreadable import Unreadable, read
from weights.errors import WeightsError, raise_problems, read_json

T = TypeVar("T")


def read_run_config(run_dir: Path) -> GPTConfig:
    """The model's config in run.json. WeightsError if it is of a version that is not known."""
    return _read(run_dir, lambda run: GPTConfig.from_dict(run.get("model", {})))


def read_run_lora(run_dir: Path) -> LoRAConfig | None:
    """The adapters' config in run.json, None if there are none. WeightsError as above."""
    return _read(run_dir, lambda run: LoRAConfig.from_dict(x) if (x := run.get("lora")) else None)


def _read(run_dir: Path, part: Callable[[dict[str, Any]], T]) -> T:
    path = run_dir / "run.json"
    run = read_json(path)
    if problem := conflict(run, ("model", "lora", "data")):
        raise WeightsError(f"{path}: {problem}")
    try:
        return part(run)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: model: {error}") from error


def check_run_tokenizer(run_dir: Path, tokenizer: Tokenizer) -> None:
    """WeightsError, with both sides, if the run was trained with another tokenizer."""
    data = _read(run_dir, lambda run: run.get("data"))
    expected = data.get("tokenizer_fingerprint") if isinstance(data, dict) else None
    if expected not in (None, found := fingerprint(tokenizer)):
        raise WeightsError(
            f"{run_dir}/tokenizer_spec.json has fingerprint {found[:12]}..., but the run was "
            f"trained with {expected[:12]}...; put its own back, which run.json has under data, "
            "tokenizer"
        )


def run_checkpoint(run_dir: Path) -> Path:
    """The Orbax item of the model to take: of the best checkpoint if kept, or else the last; there
    the average of the weights if the run keeps one.

    WeightsError if there is none yet.
    """
    return _checkpoints(run_dir)[0]


def _checkpoints(run_dir: Path) -> list[Path]:
    """All that could be taken, in this order."""
    found = []
    for kept in ("best", "checkpoints"):
        # Orbax writes a step under another name, and gives it its number when it is whole.
        steps = [p.parent for p in (run_dir / kept).glob("*/model") if p.parent.name.isdecimal()]
        for step in sorted(steps, key=lambda step: int(step.name), reverse=True):
            average = step / "average"
            found.append(average if average.exists() else step / "model")
    if not found:
        raise WeightsError(
            f"{run_dir} has no checkpoint yet; train until the first one is saved, or give "
            "another run"
        )
    return found


def read_run_arrays(
    run_dir: Path, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of the checkpoint, in the shapes, dtypes and shardings of `leaves`.

    However they were sharded when saved. What a checkpoint lacks is taken from the frozen parts.
    A damaged one is passed over, with a warning, in favour of the next: best, last, the one before.
    WeightsError if all are damaged, or if one holds other arrays.
    """
    damaged: list[DamagedError] = []
    for path in _checkpoints(run_dir.resolve()):
        try:
            arrays = _read_arrays(run_dir.resolve(), path, leaves)
        except DamagedError as error:
            if not path.is_dir():  # a run that goes on has removed it
                return read_run_arrays(run_dir, leaves)
            damaged.append(error)
            continue
        for error in damaged:
            warnings.warn(f"{error}; taking {path.parent}", stacklevel=2)
        return arrays
    raise WeightsError("; ".join(map(str, damaged)))


def _read_arrays(
    run_dir: Path, path: Path, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    stored, frozen = _stored(path), {}
    if leaves.keys() - stored.keys() and (base := run_dir / "base/0/model").is_dir():
        frozen = {name: x for name, x in _stored(base).items() if name not in stored}
        frozen = _restored(base, frozen, {n: x for n, x in leaves.items() if n in frozen})
        leaves = {name: x for name, x in leaves.items() if name not in frozen}
    return frozen | _restored(path, stored, leaves)


def _stored(path: Path) -> Mapping[str, Any]:
    """What a checkpoint says of its arrays, by name."""
    # Imported where used: `import weights` stays fast.
    import orbax.checkpoint as ocp

    def read_all() -> Mapping[str, Any]:
        return ocp.StandardCheckpointHandler().metadata(path).tree  # pyright: ignore[reportArgumentType]

    try:
        return read(read_all)
    except Unreadable as error:
        raise _damaged(path, error) from None


def _restored(
    path: Path, stored: Mapping[str, Any], leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    problems = [f"{name} is missing" for name in leaves.keys() - stored.keys()]
    problems += [f"{name} belongs to no part of this model" for name in stored.keys() - leaves]
    for name in sorted(leaves.keys() & stored.keys()):
        found, expected = tuple(stored[name].shape), leaves[name].shape
        if found != expected:
            problems.append(f"{name} has shape {found}, run.json asks for {expected}")
    if problems:
        raise_problems(str(path), sorted(problems))

    def read_all() -> tuple[dict[str, jax.Array], list[str]]:
        place = path.parent / "checksums"
        # Older checkpoints have none.
        sums = json.loads((place / "metadata").read_bytes())[path.name] if place.exists() else {}
        # As they were saved, for these bits have a checksum.
        saved = {n: _with_dtype(x, sums[n][0] if n in sums else x.dtype) for n, x in leaves.items()}
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(path, saved)
        found = checksums({name: x for name, x in arrays.items() if name in sums})
        return arrays, [name for name, value in found.items() if value != sums[name][1]]

    try:
        arrays, wrong = read(read_all)
    except Unreadable as error:
        raise _damaged(path, error) from None
    if wrong:
        raise _damaged(path, f"{', '.join(wrong)} changed since they were saved")
    return {name: arrays.pop(name).astype(leaf.dtype) for name, leaf in leaves.items()}


def _with_dtype(leaf: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


class DamagedError(WeightsError):
    """A checkpoint that cannot be read, or not as it was written."""


def _damaged(path: Path, reason: object) -> DamagedError:
    return DamagedError(f"{path}: the checkpoint is damaged ({reason})")
