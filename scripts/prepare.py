"""Prepares a dataset: token files in data/<name>/, in nanoGPT's format, with a meta.json."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# `scripts/` comes first otherwise, and `scripts/train.py` would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro  # noqa: E402

from scripts.common import parse, run_command  # noqa: E402
from train.datasets import prepare  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Prepares a dataset for training: data/<name>/{train.bin,val.bin,meta.json}.

    shakespeare_char, shakespeare: tiny Shakespeare (1.1 MB), as characters or in GPT-2's BPE.

    openwebtext, fineweb_edu: web text (9 and 10 billion tokens) through the `datasets` library.

    stdlib: source and documentation of the Python standard library (no network).

    text: your own files, for example `text --files A.txt B/ --name mine`.

    messages: conversations, of which the answers are learnt, for example `messages --files A.jsonl
    --name mine --tokenizer MODEL`. A line: {"messages": [{"role": "user", "content": "Hi"}, ...]}.
    """

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """shakespeare_char, shakespeare, openwebtext, fineweb_edu, stdlib, text or messages."""
    data_dir: Path = Path("data")
    """Folder that holds the datasets."""
    name: str | None = None
    """Name of the dataset's folder. By default the dataset's; text and messages need one."""
    source: Path | None = None
    """A local copy instead of a download: of tiny Shakespeare, or for openwebtext and fineweb_edu
    a parquet file with a column `text`, or a folder of them."""
    files: tuple[Path, ...] = ()
    """For text: UTF-8 files, or folders of them. For messages: JSONL files."""
    tokenizer: str | None = None
    """gpt2 (default), a tokenizer.json, or a model whose tokenizer it is (of the zoo, a hub id, a
    directory, a .gguf file); for text also char; for messages a model with a chat template."""
    val_fraction: float | None = None
    """Part held out for validation. By default 0.1 of your own, or 0.0005 of web documents."""
    num_proc: int | None = None
    """Number of processes (or threads). By default one a CPU. Changes nothing in the result."""
    overwrite: bool = False
    """True replaces a dataset of the same name that was made of other inputs."""


def main() -> int:
    options = vars(parse(Arguments))
    named = options["tokenizer"]
    known = named in (None, "char", "gpt2")
    chat = options["dataset"] == "messages"
    if not known and (chat or named.lower().endswith(".gguf") or not Path(named).is_file()):
        from weights import WeightsError, load_tokenizer

        try:
            options["tokenizer"] = load_tokenizer(named)
        except WeightsError as error:
            what = "neither char, gpt2, a tokenizer.json nor a model with a tokenizer"
            raise ValueError(f"--tokenizer {named!r} is {what}: {error}") from error
    try:
        manifest = prepare(options.pop("dataset"), options.pop("data_dir"), **options)
    except KeyboardInterrupt:
        print("interrupted; the same command takes it up again", file=sys.stderr)
        return 130
    for split, counted in manifest.splits.items():
        print(f"{manifest.directory}/{split}.bin: {counted.tokens:,} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
