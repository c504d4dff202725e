"""Converts a model to a Hugging Face directory: python scripts/convert.py out/gpt2-small my-gpt2"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# `scripts/` comes first otherwise, and `scripts/train.py` would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro  # noqa: E402

from scripts.common import parse, run_command  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Converts a model to a Hugging Face directory, which transformers loads. For example a run:
    python scripts/convert.py out/gpt2-small my-gpt2"""

    source: Annotated[str, tyro.conf.Positional]
    """A run directory, a Hugging Face directory, a hub id or a model of the zoo."""
    target: Annotated[Path, tyro.conf.Positional]
    """The directory to write. One that holds a saved model is replaced."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights in the files; auto is the source's."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    max_shard_gb: float = 5.0
    """Size at which the weights are split into several files, in 10^9 bytes."""


def main() -> int:
    options = parse(Arguments)
    if options.target.suffix == ".gguf":
        raise ValueError(f"{options.target}: GGUF files are not supported yet; give a directory")

    # jax is imported from here on: a mistyped flag need not wait for it.
    from eqx_gpt.tree import count_params
    from weights import from_pretrained, save_pretrained
    from weights.save import check_target
    from weights.tokenizer import find_tokenizer

    check_target(options.target)  # before hours of download
    model = from_pretrained(options.source, dtype=options.dtype, revision=options.revision)
    tokenizer = find_tokenizer(options.source, revision=options.revision)
    max_bytes = options.max_shard_gb * 1e9
    save_pretrained(model, options.target, tokenizer=tokenizer, max_shard_bytes=max_bytes)
    kind = "no tokenizer" if tokenizer is None else type(tokenizer).__name__
    print(f"{options.target}: {count_params(model):,} parameters, {kind}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
