"""Converts a model to a Hugging Face directory or a GGUF file: scripts/convert.py SRC DST[.gguf]"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# `scripts/` comes first otherwise, and `scripts/train.py` would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro  # noqa: E402

from scripts.common import parse, run_command  # noqa: E402

GGUF = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


@dataclass(frozen=True)
class Arguments:
    """Converts a model to a Hugging Face directory, which transformers loads, or to a GGUF file,
    which llama.cpp loads. For example a run: python scripts/convert.py out/gpt2-small my-gpt2"""

    source: Annotated[str, tyro.conf.Positional]
    """A run directory, a directory of Hugging Face or of PEFT's adapters, a .gguf file, a hub id or
    a model of the zoo."""
    target: Annotated[Path, tyro.conf.Positional]
    """The directory, or the file if it ends in .gguf, to write. A saved model is replaced."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = "auto"
    """Of the weights in the files; auto is the source's, float32 where those are quantised. q8_0,
    8 bits, is for .gguf alone."""
    merge: bool = True
    """Low-rank adapters become part of the weights. False: they alone are written, for PEFT."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    max_shard_gb: float = 5.0
    """Size at which a directory's weights are split into several files, in 10^9 bytes."""


def main() -> int:
    options = parse(Arguments)
    to_gguf, dtype = options.target.suffix.lower() == ".gguf", options.dtype
    if options.target.exists() and Path(options.source).resolve() == options.target.resolve():
        raise ValueError(f"{options.target} is the source; give another path for the result")
    if not options.merge and (to_gguf, dtype, options.revision) != (False, "auto", None):
        raise ValueError("--merge False writes a directory: no .gguf, --dtype or --revision")
    if dtype == "q8_0" and not to_gguf:
        raise ValueError(f"--dtype q8_0 is only for .gguf files, and {options.target} is none")

    # jax is imported from here on: a mistyped flag need not wait for it.
    from eqx_gpt.tree import count_params
    from weights import from_pretrained, gguf, save, save_gguf, save_pretrained
    from weights.load import convert_adapter, model_type_of
    from weights.tokenizer import find_tokenizer

    source, revision = options.source, options.revision
    if not options.merge:
        convert_adapter(source, options.target)
        return 0
    (gguf if to_gguf else save).check_target(options.target)  # before hours of download
    read_as = "float32" if dtype == "q8_0" else dtype
    model = from_pretrained(source, dtype=read_as, revision=revision)
    tokenizer = find_tokenizer(source, revision=revision)
    if to_gguf:
        kind = GGUF[model.wte.weight.dtype.name if dtype == "auto" else dtype]
        save_gguf(model, options.target, tokenizer=tokenizer, dtype=kind)  # pyright: ignore[reportArgumentType]
    else:
        save_pretrained(
            model,
            options.target,
            tokenizer=tokenizer,
            model_type=model_type_of(source, revision=revision),
            max_shard_bytes=options.max_shard_gb * 1e9,
        )
    kind = "no tokenizer" if tokenizer is None else type(tokenizer).__name__
    print(f"{options.target}: {count_params(model):,} parameters, {kind}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
