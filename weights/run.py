"""What training left in a run directory: its config, and the arrays of a checkpoint.

run.json                      {"format_version": 1, "model": GPTConfig.to_dict(), "lora": null or
                              the fields of LoRAConfig, "data": the manifest of its dataset, ...}
tokenizer_spec.json           the spec of its tokenizer
checkpoints/<step>/model/     an Orbax item: dotted name -> array (`eqx_gpt.tree.named_arrays`)
checkpoints/<step>/average/   the same, where the run averages its weights
best/<step>/model/            the same, where the run kept the best
base/0/model/                 the same, of frozen parts: no other checkpoint has them
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from eqx_gpt.config import GPTConfig, LoRAConfig
from eqx_gpt.record import conflict
from eqx_gpt.tokenizer import Tokenizer, fingerprint
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
    for kept in ("best", "checkpoints"):
        # Orbax writes a step under another name, and gives it its number when it is whole.
        steps = [p.parent for p in (run_dir / kept).glob("*/model") if p.parent.name.isdecimal()]
        if steps:
            last = max(steps, key=lambda step: int(step.name))
            average = last / "average"
            return average if average.exists() else last / "model"
    raise WeightsError(
        f"{run_dir} has no checkpoint yet; train until the first one is saved, or give another run"
    )


def read_run_arrays(
    run_dir: Path, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of the checkpoint, in the shapes, dtypes and shardings of `leaves`.

    However they were sharded when saved. What a checkpoint lacks is taken from the frozen parts.
    WeightsError if the checkpoint is damaged or holds other arrays.
    """
    path = run_checkpoint(run_dir).resolve()
    stored, frozen = _stored(path), {}
    if leaves.keys() - stored.keys() and (base := run_dir.resolve() / "base/0/model").is_dir():
        frozen = {name: x for name, x in _stored(base).items() if name not in stored}
        frozen = _restored(base, frozen, {n: x for n, x in leaves.items() if n in frozen})
        leaves = {name: x for name, x in leaves.items() if name not in frozen}
    return frozen | _restored(path, stored, leaves)


def _stored(path: Path) -> Mapping[str, Any]:
    """What a checkpoint says of its arrays, by name."""
    # Imported where used: `import weights` stays fast.
    import orbax.checkpoint as ocp

    try:
        return ocp.StandardCheckpointHandler().metadata(path).tree  # pyright: ignore[reportArgumentType]
    except Exception as error:  # of json, orbax, tensorstore
        raise _damaged(path, error) from error


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
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, dict(leaves))
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
    return WeightsError(
        f"{path}: the checkpoint is damaged ({reason}); remove the directory of that step to take "
        "the one before"
    )
