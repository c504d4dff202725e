"""What training left in a run directory: its config, and the arrays of a checkpoint.

run.json                      {"format_version": 1, "model": GPTConfig.to_dict(), ...}
tokenizer_spec.json           the spec of its tokenizer
checkpoints/<step>/model/     an Orbax item: dotted name -> array (`eqx_gpt.tree.named_arrays`)
best/<step>/model/            the same, where the run kept the best
"""

from collections.abc import Mapping
from pathlib import Path

import jax

from eqx_gpt.config import GPTConfig
from weights.errors import WeightsError, raise_problems, read_json

FORMAT_VERSION = 1


def read_run_config(run_dir: Path) -> GPTConfig:
    """The model's config in run.json. WeightsError if it is of a version that is not known."""
    path = run_dir / "run.json"
    run = read_json(path)
    version = run.get("format_version")
    if version != FORMAT_VERSION:
        raise WeightsError(
            f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}; a newer one needs "
            "a newer version of this package"
        )
    try:
        return GPTConfig.from_dict(run.get("model", {}))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: model: {error}") from error


def run_checkpoint(run_dir: Path) -> Path:
    """The Orbax item of the model to take: of the best checkpoint if kept, or else the last.

    WeightsError if there is none yet.
    """
    for kept in ("best", "checkpoints"):
        # Orbax writes a step under another name, and gives it its number when it is whole.
        steps = [p.parent for p in (run_dir / kept).glob("*/model") if p.parent.name.isdecimal()]
        if steps:
            return max(steps, key=lambda step: int(step.name)) / "model"
    raise WeightsError(
        f"{run_dir} has no checkpoint yet; train until the first one is saved, or give another run"
    )


def read_run_arrays(
    run_dir: Path, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of the checkpoint, in the shapes, dtypes and shardings of `leaves`.

    However they were sharded when saved. WeightsError if the checkpoint is damaged or holds
    other arrays.
    """
    # Imported where used: `import weights` stays fast.
    import orbax.checkpoint as ocp

    path = run_checkpoint(run_dir).resolve()
    try:
        stored = ocp.StandardCheckpointHandler().metadata(path).tree  # pyright: ignore[reportArgumentType]
    except Exception as error:  # of json, orbax, tensorstore
        raise _damaged(path, error) from error
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
