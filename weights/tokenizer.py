"""A model's tokenizer, from its files and to them."""

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eqx_gpt.tokenizer import (
    END_OF_TEXT,
    GPT2Tokenizer,
    JSONTokenizer,
    Tokenizer,
    tokenizer_from_spec,
)
from weights.errors import WeightsError, read_json
from weights.hub import Source, find

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
SPEC = "tokenizer_spec.json"


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model, named as for `from_pretrained`. GPT-2's needs no network.

    WeightsError if the model has none, or one that is neither a `tokenizer.json` nor GPT-2's.
    """
    tokenizer = find_tokenizer(name_or_path, revision=revision)
    if tokenizer is None:
        raise WeightsError(
            f"{name_or_path} has no tokenizer: expected tokenizer.json, {SPEC}, or vocab.json and "
            "merges.txt"
        )
    return tokenizer


def find_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Tokenizer | None:
    """As `load_tokenizer`, but None if there are no files of one."""
    if name_or_path in GPT2_NAMES:
        return GPT2Tokenizer()
    source = find(name_or_path, revision)
    path = source.find_file("tokenizer.json", SPEC, "merges.txt")
    if path is None:
        return None
    try:
        if path.name == SPEC:
            return tokenizer_from_spec(read_json(path))
        if path.name == "tokenizer.json":
            return JSONTokenizer(path.read_text("utf-8"), _end_of_text(source))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from error
    vocab, merges = gpt2_vocab_and_merges()
    found = path.read_text("utf-8", errors="replace").rstrip("\n").split("\n")[1:]
    if found != [" ".join(pair) for pair in merges]:
        raise WeightsError(
            f"{path} holds other merges than GPT-2's; make a tokenizer.json with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(DIRECTORY)"
        )
    if read_json(source.file("vocab.json")) != vocab:
        raise WeightsError(f"{source.location}: vocab.json holds other ids than GPT-2's")
    return GPT2Tokenizer()


def _end_of_text(source: Source) -> str | None:
    path = source.find_file("tokenizer_config.json")
    token = None if path is None else read_json(path).get("eos_token")
    return token.get("content") if isinstance(token, Mapping) else token


def write_tokenizer(tokenizer: Tokenizer, directory: Path, block_size: int) -> None:
    """Writes the files that `load_tokenizer` reads.

    GPT-2's and a JSONTokenizer become the tokenizer.json that transformers' AutoTokenizer loads,
    any other its spec, which only this package reads.
    """
    match tokenizer:
        case GPT2Tokenizer():
            text, end = gpt2_tokenizer_json(), END_OF_TEXT
            special = {"bos_token": end, "eos_token": end, "unk_token": end}
            described = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special}
        case JSONTokenizer(text, end):
            described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        case _:
            _write_json(directory / SPEC, tokenizer.spec())
            return
    (directory / "tokenizer.json").write_text(text, "utf-8", newline="\n")
    described["model_max_length"] = block_size
    _write_json(directory / "tokenizer_config.json", described)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def gpt2_vocab_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's vocabulary and merges in the spelling of its files, one character a byte."""
    # Imported where used: `import weights` stays fast.
    from tokenizers.pre_tokenizers import ByteLevel

    data = importlib.resources.files("eqx_gpt").joinpath("data/gpt2_vocab.bpe")
    lines = data.read_text("utf-8").rstrip("\n").split("\n")[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    tokens = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges), END_OF_TEXT]
    return {token: i for i, token in enumerate(tokens)}, merges


def gpt2_tokenizer_json() -> str:
    """The tokenizer.json of GPT-2."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as BPETokenizer

    vocab, merges = gpt2_vocab_and_merges()
    tokenizer = BPETokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer.to_str()
