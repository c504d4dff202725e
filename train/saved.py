"""What a checkpoint says of its arrays, before they are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eqx_gpt.unreadable import Unreadable, read
from train.run import RunError


def check_arrays(item: Path, leaves: Mapping[str, Any]) -> None:
    """RunError, naming both sides, if an Orbax item holds other arrays than `leaves` describes.

    An item that cannot even say what it holds is damaged: reading it tells.
    """
    import orbax.checkpoint as ocp

    def read_all() -> dict[str, tuple[int, ...]]:
        metadata: Any = ocp.StandardCheckpointHandler().metadata(item)  # pyright: ignore[reportArgumentType]
        return {name: tuple(array.shape) for name, array in metadata.tree.items()}

    try:
        stored = read(read_all)
    except (Unreadable, OSError):
        return
    problems = [f"{name} is missing" for name in sorted(leaves.keys() - stored.keys())]
    problems += [f"{name} belongs to no part" for name in sorted(stored.keys() - leaves.keys())]
    problems += [
        f"{name} has shape {stored[name]}, run.json asks for {tuple(leaf.shape)}"
        for name, leaf in leaves.items()
        if name in stored and stored[name] != tuple(leaf.shape)
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RunError(
            f"{item} is of another model than run.json: {'; '.join(problems[:3])}{more}. Put back "
            "the checkpoints or the run.json that belong together"
        )
