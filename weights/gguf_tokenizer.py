"""Tokenizers in the metadata of GGUF files, as the `tokenizer.json` of the same tokens, and back.

llama.cpp knows byte-level BPE as "gpt2", with the name of how text is split before, and
SentencePiece's BPE as "llama", by the scores of its tokens. What they do:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eqx_gpt.config import did_you_mean
from eqx_gpt.tokenizer import JSONTokenizer
from weights.errors import WeightsError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KEY = "tokenizer.ggml."
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
LONGEST_TOKEN = 1024  # characters
MOST_MERGES_A_TOKEN = 64  # SentencePiece's have about 3
STOPS = ("eot_token_id", "eom_token_id")
SPACE = "\u2581"  # SentencePiece's


def _split(regex: str) -> dict[str, Any]:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    """With GPT-2's regex, or none."""
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **flags}


@dataclass(frozen=True)
class Splitting:
    """How text is cut before the merges. `whole`: a piece that is a token needs no merges."""

    steps: tuple[dict[str, Any], ...]
    whole: bool = False
    normalizer: dict[str, Any] | None = None


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_GPT2 = Splitting((_byte_level(True),))
_DIGITS = Splitting(({"type": "Digits", "individual_digits": True}, _byte_level(True)))
_QWEN2 = Splitting(
    (_split(_LLAMA3.replace("{1,3}", "")), _byte_level(False)), normalizer={"type": "NFC"}
)
SPLITTINGS = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": Splitting((_split(_LLAMA3), _byte_level(False)), whole=True),
    "llama-v3": Splitting((_split(_LLAMA3), _byte_level(False)), whole=True),
    "dbrx": Splitting((_split(_LLAMA3), _byte_level(False))),
    "smaug-bpe": Splitting((_split(_LLAMA3), _byte_level(False))),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "default": Splitting((*map(_split, _DEFAULT), _byte_level(False))),
}
"""llama.cpp's name -> what it names. llama.cpp does not normalise Qwen's text; Qwen does."""


# Reading


def read_tokenizer(metadata: Mapping[str, Any]) -> JSONTokenizer | None:
    """The tokenizer that the metadata describes, None if it has none. WeightsError if unknown."""
    kind = metadata.get(KEY + "model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise WeightsError(f"{KEY}model is {kind!r:.80}, only 'gpt2' and 'llama' are supported")
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int) if KEY + "token_type" in metadata else []
    types = types or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise WeightsError(f"{KEY}token_type has {len(types)} entries for {len(tokens)} tokens")
    n = len(tokens)
    while n and types[n - 1] == UNUSED and tokens[n - 1] == f"[PAD{n - 1}]":
        n -= 1
    tokens, types = tokens[:n], types[:n]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or not tokens or "" in vocab:
        raise WeightsError(f"{KEY}tokens: expected different texts, none of them empty")
    longest = max(map(len, tokens))
    if longest > LONGEST_TOKEN:
        raise WeightsError(f"{KEY}tokens: one has {longest} characters, at most {LONGEST_TOKEN}")
    special = _special_tokens(metadata, kind, tokens)
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        **(_byte_bpe if kind == "gpt2" else _sentencepiece)(metadata, vocab, types),
        "post_processor": _ends(metadata, kind, special, vocab),
    }
    ids = [metadata.get(KEY + name) for name in STOPS]
    end = special.get("eos_token")
    known = [tokens[i] for i in ids if isinstance(i, int) and 0 <= i < len(tokens)]
    stops = [token for token in known if token != end]
    template = metadata.get("tokenizer.chat_template")
    try:
        return JSONTokenizer(
            json.dumps(description),
            end,
            special_tokens=special,
            stop_tokens=tuple(stops),
            chat_template=template if isinstance(template, str) else None,
        )
    except ValueError as error:
        raise WeightsError(f"{KEY}*: {error}") from error


def _list(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values = metadata.get(KEY + name)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        found = "nothing" if values is None else f"{values!r:.80}"
        raise WeightsError(f"{KEY}{name}: expected a list of {kind.__name__}, found {found}")
    return values


def _special_tokens(metadata: Mapping[str, Any], kind: str, tokens: list[str]) -> dict[str, str]:
    defaults = {"bos_token": 1, "eos_token": 2, "unk_token": 0} if kind == "llama" else {}
    special = {}
    for name, key in SPECIAL.items():
        i = metadata.get(KEY + key, defaults.get(name))
        if isinstance(i, int) and 0 <= i < len(tokens):
            special[name] = tokens[i]
    return special


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]


def _byte_bpe(
    metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]
) -> dict[str, Any]:
    name = metadata.get(KEY + "pre", "default")
    if not isinstance(name, str) or name not in SPLITTINGS:
        raise WeightsError(
            f"{KEY}pre is {name!r:.80}, a way to split text that is not known here; "
            f"{did_you_mean(str(name)[:80], SPLITTINGS)}"
        )
    splitting = SPLITTINGS[name]
    merges = []
    for merge in _list(metadata, "merges", str):
        space = merge.find(" ", 1)
        if space < 0:
            raise WeightsError(f"{KEY}merges: {merge!r:.80} is no pair of tokens")
        pair = [merge[:space], merge[space + 1 :]]
        if not {*pair, "".join(pair)} <= vocab.keys():
            raise WeightsError(f"{KEY}merges: {merge!r:.80} does not make a token from two")
        merges.append(pair)
    return {
        "normalizer": splitting.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(splitting.steps)},
        "decoder": {**_byte_level(True), "add_prefix_space": True},
        "model": _bpe(vocab, merges, ignore_merges=splitting.whole),
    }


def _sentencepiece(
    metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]
) -> dict[str, Any]:
    """A space goes before each piece of text, between special tokens too, as in llama.cpp."""
    scores = _list(metadata, "scores", float)
    if len(scores) < len(vocab):
        raise WeightsError(f"{KEY}scores has {len(scores)} entries for {len(vocab)} tokens")
    prefix = metadata.get(KEY + "add_space_prefix", True)
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = [token for token, kind in zip(vocab, types, strict=True) if kind == UNKNOWN]
    flags = {"fuse_unk": True, "byte_fallback": True, "unk_token": unknown[0] if unknown else None}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, _replace(" ", SPACE)]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
        "model": _bpe(vocab, _merges(vocab, types, scores), **flags),
    }


def _merges(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every pair of tokens that makes a token, those of the best score first."""
    usable = {token: i for token, i in vocab.items() if types[i] == NORMAL}
    merges = [
        (scores[i], at, token)
        for token, i in usable.items()
        for at in range(1, len(token))
        if token[:at] in usable and token[at:] in usable
    ]
    if len(merges) > MOST_MERGES_A_TOKEN * len(usable):
        raise WeightsError(f"{KEY}tokens: {len(merges)} pairs make {len(usable)} tokens: absurd")
    merges.sort(key=lambda merge: (-merge[0], -merge[1], merge[1] - len(merge[2])))
    return [[token[:at], token[at:]] for _, at, token in merges]


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _bpe(vocab: dict[str, int], merges: list[list[str]], **flags: Any) -> dict[str, Any]:
    nothing = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    defaults = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model = {"type": "BPE", **dict.fromkeys(nothing), **defaults, **flags}
    return {**model, "vocab": vocab, "merges": merges}


def _ends(
    metadata: Mapping[str, Any], kind: str, special: dict[str, str], vocab: dict[str, int]
) -> dict[str, Any] | None:
    """The tokens at the ends, which are added only where they are asked for."""
    bos_is_usual = kind == "llama" or metadata.get(KEY + "pre") in ("llama-bpe", "llama-v3")
    wanted = {
        "bos_token": metadata.get(KEY + "add_bos_token", bos_is_usual),
        "eos_token": metadata.get(KEY + "add_eos_token", False),
    }
    ends = [special[name] for name in wanted if wanted[name] and name in special]
    if not ends:
        return None
    texts: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*texts, {"Sequence": {"id": "B", "type_id": 1}}]
    for name, token in special.items():
        if token in ends and wanted.get(name):
            one = {"SpecialToken": {"id": token, "type_id": 0}}
            first = name == "bos_token"
            texts, pair = ([one, *x] if first else [*x, one] for x in (texts, pair))
    tokens = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in ends}
    return {"type": "TemplateProcessing", "single": texts, "pair": pair, "special_tokens": tokens}


# Writing


def write_tokenizer(tokenizer: JSONTokenizer, n_vocab: int) -> dict[str, Any]:
    """The metadata of a tokenizer, for a model of `n_vocab` tokens.

    WeightsError if llama.cpp would cut text otherwise.
    """
    description = json.loads(tokenizer.tokenizer_json)
    model = description["model"]
    if model.get("type") != "BPE":
        raise WeightsError(
            f"the tokenizer is of type {model.get('type')!r}, only BPE can be written to GGUF; "
            "leave the tokenizer out, or save a Hugging Face directory"
        )
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    tokens, types = _tokens(description, n_vocab)
    kind: dict[str, Any]
    if model.get("byte_fallback"):
        kind = {"model": "llama", "pre": "default", **_scores(tokens, types, merges)}
        kind["add_space_prefix"] = _adds_space(description)
    else:
        kind = {"model": "gpt2", "pre": _splitting_name(description)}
        kind["merges"] = [" ".join(merge) for merge in merges]
        if not merges or any(" " in part for merge in merges for part in merge):
            raise WeightsError("the tokenizer has no merges, or of spaces, which GGUF cannot hold")
    special = {SPECIAL[k]: v for k, v in tokenizer.special_tokens.items() if k in SPECIAL}
    if tokenizer.end_of_text_token is not None:
        special.setdefault("eos_token_id", tokenizer.end_of_text_token)
    stops = [token for token in tokenizer.stop_tokens if token != special.get("eos_token_id")]
    if len(stops) > len(STOPS):
        raise WeightsError(
            f"{len(stops) + 1} different tokens end an answer, GGUF holds {len(STOPS) + 1}; give "
            "a tokenizer with fewer stop_tokens"
        )
    special |= dict(zip(STOPS, stops, strict=False))
    index = {token: i for i, token in enumerate(tokens)}
    ids = {name: index[token] for name, token in special.items()}
    first, last = _added_ends(tokenizer)
    metadata = {
        **kind,
        "tokens": tokens,
        "token_type": types,
        **ids,
        "add_bos_token": first is not None and first == ids.get("bos_token_id"),
        "add_eos_token": last is not None and last == ids.get("eos_token_id"),
    }
    described = {KEY + name: value for name, value in metadata.items()}
    if tokenizer.chat_template is not None:
        described["tokenizer.chat_template"] = tokenizer.chat_template
    return described


def _tokens(description: Mapping[str, Any], n_vocab: int) -> tuple[list[str], list[int]]:
    """The text and the type of each id; of ids without a token, those of llama.cpp's converter."""
    model = description["model"]
    found = {i: (token, _type(token, model)) for token, i in model["vocab"].items()}
    for token in description.get("added_tokens", []):
        content, i = token["content"], token["id"]
        if i >= n_vocab:
            continue  # an added token that the model has no embedding of
        if any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
            raise WeightsError(f"the token {content!r:.80} takes spaces, which GGUF cannot hold")
        kind = CONTROL if token["special"] else USER_DEFINED
        found[i] = (content, UNKNOWN if content == model.get("unk_token") else kind)
    if max(found) >= n_vocab:
        raise WeightsError(
            f"the tokenizer has {max(found) + 1} tokens, the model {n_vocab}; give the tokenizer "
            "that the model was trained with"
        )
    padded = [found.get(i, (f"[PAD{i}]", UNUSED)) for i in range(n_vocab)]
    return [token for token, _ in padded], [kind for _, kind in padded]


def _type(token: str, model: Mapping[str, Any]) -> int:
    if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
        return BYTE
    return UNKNOWN if token == model.get("unk_token") else NORMAL


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> dict[str, Any]:
    """Scores with which llama.cpp merges as the tokenizer does."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    implied = _merges({token: i for i, token in enumerate(tokens)}, types, scores)
    same = {tuple(m) for m in implied} == {tuple(m) for m in merges}
    if not same or [a + b for a, b in implied] != [a + b for a, b in merges]:
        raise WeightsError(
            "the tokenizer does not merge by the scores of its tokens, as GGUF does; leave it out"
        )
    return {"scores": scores}


def _flat(step: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [dict(x) for x in step[inner]] if step["type"] == "Sequence" else [dict(step)]


def _splitting_name(description: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way the tokenizer splits text."""

    def essence(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]

    steps = essence(_flat(description.get("pre_tokenizer"), "pretokenizers"))
    normalizer = description.get("normalizer")
    whole = bool(description["model"].get("ignore_merges"))
    for name, splitting in SPLITTINGS.items():
        same = (steps, whole) == (essence(list(splitting.steps)), splitting.whole)
        if same and normalizer in (None, splitting.normalizer):
            return name
    raise WeightsError(
        f"the tokenizer splits text by {steps!r:.300}, which is not known to be one of llama.cpp's "
        "ways; leave the tokenizer out, or save a Hugging Face directory"
    )


def _adds_space(description: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before text."""
    normalizers = _flat(description.get("normalizer"), "normalizers")
    splits = _flat(description.get("pre_tokenizer"), "pretokenizers")
    match [step["type"] for step in normalizers], [step["type"] for step in splits]:
        case ["Prepend", "Replace"], []:
            return True
        case ["Replace"], [] | ["Split"]:
            return False
        case [], ["Metaspace"] if not splits[0].get("split", True):
            return splits[0].get("prepend_scheme", "always") != "never"
        case found:
            raise WeightsError(
                f"the tokenizer prepares text by {found}, which GGUF cannot hold; leave it out"
            )


def _added_ends(tokenizer: JSONTokenizer) -> tuple[int | None, int | None]:
    """The ids before and after a text where special tokens are asked for."""
    # Imported where used: `import weights` stays fast.
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(tokenizer.tokenizer_json).encode("a").ids
    inside = tokenizer.encode("a")
    at = next((i for i in range(len(ids)) if ids[i : i + len(inside)] == inside), 0)
    before, after = ids[:at], ids[at + len(inside) :]
    return (before[0] if before else None), (after[-1] if after else None)
