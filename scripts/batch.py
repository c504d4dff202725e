"""Shows the text that a step of a run trains on: python scripts/batch.py --out_dir DIR --step N."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.common import parse, run_command  # noqa: E402
from train.run import run_config  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Shows the text that a step of a run trains on, whether it was done or is to come."""

    out_dir: str = "out"
    """The run."""
    step: int = 0
    """The step, as metrics.jsonl counts them (`iter`)."""
    rows: int | None = None
    """How many of the step's sequences to show. None: all."""
    characters: int | None = None
    """How much to show of each. None: all."""


def main() -> int:
    arguments = parse(Arguments)
    if arguments.step < 0:
        raise ValueError(f"step must be 0 or above, got {arguments.step}")
    config = run_config(arguments.out_dir)

    from train.batches import describe_batch
    from train.manifest import Manifest
    from train.packing import windows_of

    data = Manifest.read(Path(config.data_dir) / config.dataset)
    windows = windows_of(data, "train", config.block_size, config.seed)
    for line in describe_batch(
        data,
        windows,
        arguments.step,
        config.global_batch_size,
        arguments.rows,
        arguments.characters,
    ):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
