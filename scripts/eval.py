"""The loss of a model on a dataset: python scripts/eval.py --init_from gpt2 --dataset NAME."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# `scripts/` comes first otherwise, and `scripts/train.py` would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.environment import prepare_process  # noqa: E402

prepare_process(__name__)  # may start this anew, so it comes before the slow imports

from scripts.common import model_source, parse, run_command  # noqa: E402
from train.config import TrainConfig  # noqa: E402
from train.manifest import Manifest, check_same_tokenizer  # noqa: E402
from train.presets import get_preset  # noqa: E402
from train.progress import reporting  # noqa: E402
from train.run import check_own_data, run_config  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Mean loss over every token of a split, in consecutive blocks or with a sliding window; of
    conversations, over the answers, each conversation by itself. The last line on stdout is JSON:
    loss (nats a token), perplexity, bits_per_byte and on what."""

    preset: str | None = None
    """eval-gpt2, eval-gpt2-medium, ...: fills in init_from and dataset."""
    init_from: str | None = None
    """resume (the run in out_dir), a zoo name, hub id, directory. None: the preset's or resume."""
    out_dir: str = "out"
    """The run to evaluate: its best evaluation's model if it kept one, else its newest."""
    dataset: str | None = None
    """A dataset prepared by scripts/prepare.py. None: the run's own, otherwise openwebtext."""
    data_dir: str | None = None
    """Where prepared datasets are. None: where the run's were, or data."""
    split: Literal["train", "val"] = "val"
    """Which part of the dataset."""
    block_size: int | None = None
    """Tokens in a block; no token sees beyond it. None: the model's, or what conversations need."""
    stride: int | None = None
    """Slide the block by so many tokens and count those alone, each predicted from more than
    block_size - stride: block_size / stride times the work. None: consecutive blocks."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""
    batch_size: int = 8
    """Blocks run at once."""


def main() -> int:
    options = parse(Arguments)
    preset = None if options.preset is None else get_preset(options.preset)
    init_from = options.init_from or ("resume" if preset is None else preset.init_from)
    source = model_source(init_from, options.out_dir)
    run = options.out_dir if init_from == "resume" and preset is None else None
    defaults = preset or (TrainConfig() if run is None else run_config(run))
    dataset = options.dataset or defaults.dataset
    data = Manifest.read(Path(options.data_dir or defaults.data_dir) / dataset)
    check_own_data(None if options.dataset else run, data)
    from train.evaluate import block_size_for, dataset_measures  # imports jax

    model, tokenizer = source()
    check_same_tokenizer(data, tokenizer)
    block_size = block_size_for(model, data, options.split, options.block_size)
    total = data.splits[options.split].tokens - 1
    with reporting(f"evaluating {dataset}/{options.split}", total, "tokens") as update:
        result = dataset_measures(
            model, data, options.split, block_size=block_size, stride=options.stride,
            micro_batch_size=options.batch_size, dtype=options.precision, progress=update,
        )  # fmt: skip
    how = {"split": options.split, "stride": options.stride, "precision": options.precision}
    print(json.dumps({**result, "dataset": dataset, "block_size": block_size, **how}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
