"""A model's tokenizer, from its files and to them."""

import importlib.resources
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
from weights.adapters import base_of
from weights.errors import WeightsError, read_json, write_json
from weights.gguf_file import read_gguf
from weights.gguf_tokenizer import read_tokenizer
from weights.hub import Source, find
from weights.run import check_run_tokenizer

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
SPEC = "tokenizer_spec.json"
TEMPLATE = "chat_template.jinja"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model, named as for `from_pretrained`, or in a file tokenizer.json, with
    what lies beside it. GPT-2's needs no network.

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
    path = Path(name_or_path).expanduser()
    if path.name == "tokenizer.json" and path.is_file():
        source = Source("directory", str(path.parent))
    else:
        source = find(name_or_path, revision)
    if source.kind == "gguf":
        file = read_gguf(source.path)
        try:
            return read_tokenizer(file.metadata)
        except WeightsError as error:
            raise WeightsError(f"{file.path}: {error}") from error
    path = source.find_file("tokenizer.json", SPEC, "merges.txt")
    if path is None:
        return find_tokenizer(base_of(source)) if source.kind == "adapter" else None
    try:
        if path.name == SPEC:
            tokenizer = tokenizer_from_spec(read_json(path))
            if source.kind == "run":
                check_run_tokenizer(source.path, tokenizer)
            return tokenizer
        if path.name == "tokenizer.json":
            return _json_tokenizer(path.read_text("utf-8"), source)
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
        raise WeightsError(
            f"{source.location}: vocab.json holds other ids than GPT-2's; make a tokenizer.json "
            "with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(DIRECTORY)"
        )
    return GPT2Tokenizer()


def _json_tokenizer(text: str, source: Source) -> JSONTokenizer:
    """With what the files beside it say of its tokens; not with tokens that it does not have."""
    plain = JSONTokenizer(text)
    path = source.find_optional("tokenizer_config.json")
    config = {} if path is None else read_json(path)
    special: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str) and plain.token_id(token) is not None:
            special[name] = token
    ids: dict[str, list[str]] = {}
    for name in ("generation_config.json", "config.json"):
        path = source.find_optional(name)
        described = {} if path is None else read_json(path)
        for token in SPECIAL_TOKENS:
            if token not in ids and f"{token}_id" in described:
                given = described[f"{token}_id"]
                given = given if isinstance(given, list) else [given]
                texts = [plain.token_text(i) for i in given if isinstance(i, int)]
                ids[token] = [text for text in texts if text is not None]
    special = {name: texts[0] for name, texts in ids.items() if texts} | special
    end = special.get("eos_token")
    stops = tuple(token for token in ids.get("eos_token", []) if token != end)
    return JSONTokenizer(text, end, special, stops, _chat_template(config, source))


def _chat_template(config: Mapping[str, Any], source: Source) -> str | None:
    path = source.find_optional(TEMPLATE)
    if path is not None:
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {x.get("name"): x.get("template") for x in template if isinstance(x, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids in config.json and generation_config.json; several where several end an answer."""
    match tokenizer:
        case JSONTokenizer():
            ids = {name: tokenizer.token_id(x) for name, x in tokenizer.special_tokens.items()}
            ends = [tokenizer.end_of_text, *map(tokenizer.token_id, tokenizer.stop_tokens)]
        case _:
            ids = dict.fromkeys(tokenizer.special_tokens, tokenizer.end_of_text)
            ends = [tokenizer.end_of_text]
    ends = [i for i in ends if i is not None]
    return {
        "bos_token_id": ids.get("bos_token"),
        "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_token_id": ids.get("pad_token"),
    }


def write_tokenizer(tokenizer: Tokenizer, directory: Path, block_size: int) -> None:
    """Writes the files that `load_tokenizer` reads.

    GPT-2's and a JSONTokenizer become the tokenizer.json that transformers' AutoTokenizer loads,
    any other its spec, which only this package reads.
    """
    match tokenizer:
        case GPT2Tokenizer():
            text = gpt2_tokenizer_json()
            described = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        case JSONTokenizer(text, end):
            described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        case _:
            write_json(directory / SPEC, tokenizer.spec())
            return
    (directory / "tokenizer.json").write_text(text, "utf-8", newline="\n")
    described |= {**tokenizer.special_tokens, "model_max_length": block_size}
    write_json(directory / "tokenizer_config.json", described)
    if tokenizer.chat_template is not None:
        (directory / TEMPLATE).write_text(tokenizer.chat_template, "utf-8", newline="")


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
