"""Text to token ids and back: characters, GPT-2's BPE, or any Hugging Face `tokenizer.json`.

Every tokenizer is a frozen dataclass that follows the `Tokenizer` protocol, and carries no more
than its `spec()`: a dict that goes into a dataset's `meta.json` and into a run, and from which
`tokenizer_from_spec` rebuilds it. Nothing is read from disk but GPT-2's merges, package data.
"""

import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from typing import Any, Literal, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt32

SpecialText = Literal["text", "token"]
"""What a string such as `<|endoftext|>` inside a text is: ordinary text, or the special token."""

TokenIds = UInt32[np.ndarray, "_"]

END_OF_TEXT = "<|endoftext|>"

GPT2_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@runtime_checkable
class Tokenizer(Protocol):
    """What training, sampling and preparing data need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The id that separates documents, or None where the vocabulary has none."""
        ...

    @property
    def prefix(self) -> tuple[int, ...]:
        """What the model expects before every text, mostly nothing. `encode` does not add it."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The text of each special token, by its name in transformers: `bos_token` and so on."""
        ...

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens that end an answer, beyond the one that ends a text."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that makes one text of a conversation, where the model has one."""
        ...

    def encode(self, text: str, *, special: SpecialText = "text") -> list[int]:
        """The ids of `text`. No token is added at either end."""
        ...

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[TokenIds]:
        """`encode(text)` of each text, as arrays and in parallel: the fast path for corpora."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError on unknown ids."""
        ...

    def spec(self) -> dict[str, Any]:
        """A JSON-able description from which `tokenizer_from_spec` rebuilds the tokenizer."""
        ...


@dataclass(frozen=True)
class CharTokenizer:
    """One id a character, in the order of their code points, as in nanoGPT's shakespeare_char."""

    characters: str

    def __post_init__(self) -> None:
        if not self.characters or list(self.characters) != sorted(set(self.characters)):
            raise ValueError(
                "CharTokenizer: the characters must be distinct, sorted and at least one, found "
                f"{_shortened(self.characters)}; CharTokenizer.from_text(text) makes them so"
            )

    @staticmethod
    def from_text(text: str) -> "CharTokenizer":
        return CharTokenizer("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @property
    def end_of_text(self) -> None:
        return None

    @property
    def prefix(self) -> tuple[int, ...]:
        return ()

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return {}

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        return ()

    @property
    def chat_template(self) -> None:
        return None

    @cached_property
    def _codes(self) -> UInt32[np.ndarray, " vocab"]:
        return _code_points(self.characters)

    def encode(self, text: str, *, special: SpecialText = "text") -> list[int]:
        return self._encode_array(text).tolist()

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[TokenIds]:
        return [self._encode_array(text) for text in texts]

    def _encode_array(self, text: str) -> TokenIds:
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if unknown.size:
            at = int(unknown[0])
            raise ValueError(
                f"CharTokenizer: character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is"
                f" not among the {self.vocab_size} known ones, {_shortened(self.characters)};"
                " remove it, or use a tokenizer made from a text that has it"
            )
        return ids.astype(np.uint32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return "".join(self.characters[i] for i in _checked_ids(ids, self.vocab_size))

    def spec(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


@dataclass(frozen=True)
class GPT2Tokenizer:
    """GPT-2's byte-level BPE: OpenAI's merges, run by tiktoken."""

    @property
    def vocab_size(self) -> int:
        return 50257

    @property
    def end_of_text(self) -> int:
        return 50256

    @property
    def prefix(self) -> tuple[int, ...]:
        return ()

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        return ()

    @property
    def chat_template(self) -> None:
        return None

    @cached_property
    def _encoding(self) -> Any:
        # Imported where used: `import eqx_gpt` stays fast, and works without it.
        import tiktoken

        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        return tiktoken.Encoding(
            "gpt2",
            pat_str=pattern,
            mergeable_ranks=_gpt2_ranks(),
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str, *, special: SpecialText = "text") -> list[int]:
        return self._encode_array(text, special).tolist()

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[TokenIds]:
        _ = self._encoding  # built once, before the threads
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode_array, texts))

    def _encode_array(self, text: str, special: SpecialText = "text") -> TokenIds:
        allowed = {END_OF_TEXT} if special == "token" else set()
        return self._encoding.encode_to_numpy(
            _without_surrogates(text), allowed_special=allowed, disallowed_special=()
        )

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self._encoding.decode(_checked_ids(ids, self.vocab_size))

    def spec(self) -> dict[str, Any]:
        return {"kind": "gpt2", "vocab_bpe_sha256": GPT2_VOCAB_BPE_SHA256}


@dataclass(frozen=True)
class JSONTokenizer:
    """A Hugging Face `tokenizer.json`, run by the `tokenizers` library.

    `end_of_text_token` is not in that file but beside it (`eos_token` in `tokenizer_config.json`),
    and so are the other special tokens and the template.
    Whatever the file says of them, no text is truncated or padded and no token is added.
    """

    tokenizer_json: str = field(repr=False)
    end_of_text_token: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    stop_tokens: tuple[str, ...] = ()
    chat_template: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _ = self._tokenizers  # a malformed file is refused here, not at the first use
        named = {"end_of_text_token": self.end_of_text_token, **self.special_tokens}
        named |= {f"stop token {i}": token for i, token in enumerate(self.stop_tokens)}
        for name, token in named.items():
            if token is not None and self.token_id(token) is None:
                raise ValueError(
                    f"JSONTokenizer: {name} {token!r} is not in the vocabulary; give a token of "
                    "the tokenizer.json, or None"
                )

    @cached_property
    def _tokenizers(self) -> dict[SpecialText, Any]:
        """One tokenizer for each meaning of special strings: the library keeps it as state."""
        import tokenizers

        def build(special: SpecialText) -> Any:
            try:
                tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer_json)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # the library raises bare Exceptions, and panics
                raise ValueError(
                    f"JSONTokenizer: not a Hugging Face tokenizer.json ({error}); give the text of"
                    " the file that `tokenizer.save(...)` writes"
                ) from None
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = special == "text"
            # No token is added in any case, and some would take white space out of the spans.
            tokenizer.post_processor = None
            return tokenizer

        return {"text": build("text"), "token": build("token")}

    @cached_property
    def _largest_id(self) -> int:
        return max(self._tokenizers["text"].get_vocab(with_added_tokens=True).values())

    @property
    def vocab_size(self) -> int:
        return self._largest_id + 1

    @property
    def n_trained(self) -> int:
        """Tokens but for those that were added, which a model may have no embedding of."""
        return self._tokenizers["text"].get_vocab_size(with_added_tokens=False)

    @property
    def end_of_text(self) -> int | None:
        return None if self.end_of_text_token is None else self.token_id(self.end_of_text_token)

    @property
    def prefix(self) -> tuple[int, ...]:
        """Of the file's post-processor: what it puts before a text, but not what after it."""
        return self._prefix

    @cached_property
    def _prefix(self) -> tuple[int, ...]:
        import tokenizers

        made = tokenizers.Tokenizer.from_str(self.tokenizer_json).encode("a")
        marks = [*made.special_tokens_mask, 0]
        return tuple(made.ids[: marks.index(0)])

    def token_id(self, token: str) -> int | None:
        """The id of one token of the vocabulary, None if it is none."""
        return self._tokenizers["text"].token_to_id(token)

    def token_text(self, i: int) -> str | None:
        """The inverse of `token_id`: how the vocabulary spells the token."""
        return self._tokenizers["text"].id_to_token(i) if 0 <= i < self.vocab_size else None

    def encode(self, text: str, *, special: SpecialText = "text") -> list[int]:
        text = _without_surrogates(text)
        return self._tokenizers[special].encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str) -> tuple[TokenIds, Int32[np.ndarray, "_ 2"]]:
        """The ids of a text with special tokens, and of which characters each was made.

        A span is the first character and the one after the last; tokens that share a character,
        parts of its bytes, have the same.
        """
        encoding = self._tokenizers["token"].encode(text, add_special_tokens=False)
        spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        return np.array(encoding.ids, np.uint32), spans

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[TokenIds]:
        with ThreadPoolExecutor(threads) as pool:
            return [np.array(ids, np.uint32) for ids in pool.map(self.encode, texts)]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        ids = _checked_ids(ids, self.vocab_size)
        return self._tokenizers["text"].decode(ids, skip_special_tokens=False)

    def spec(self) -> dict[str, Any]:
        return {
            "kind": "tokenizer.json",
            "end_of_text_token": self.end_of_text_token,
            "tokenizer_json": self.tokenizer_json,
            # Only where there are any: that of a plain file stays as it was.
            **({"special_tokens": dict(self.special_tokens)} if self.special_tokens else {}),
            **({"stop_tokens": list(self.stop_tokens)} if self.stop_tokens else {}),
            **({} if self.chat_template is None else {"chat_template": self.chat_template}),
        }


def tokenizer_from_spec(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `spec`, made by `Tokenizer.spec`, describes. ValueError if it cannot."""
    match dict(spec):
        case {"kind": "char", "characters": str(characters), **rest} if not rest:
            return CharTokenizer(characters)
        case {"kind": "gpt2", "vocab_bpe_sha256": str(sha256), **rest} if not rest:
            if sha256 != GPT2_VOCAB_BPE_SHA256:
                raise ValueError(
                    f"tokenizer: GPT-2 merges with sha256 {sha256} were asked for, this package "
                    f"holds {GPT2_VOCAB_BPE_SHA256}; use a tokenizer.json of the other merges"
                )
            return GPT2Tokenizer()
        case {
            "kind": "tokenizer.json",
            "tokenizer_json": str(text),
            "end_of_text_token": (str() | None) as end_of_text,
            **rest,
        } if (beside := _beside(rest)) is not None:
            return JSONTokenizer(text, end_of_text, **beside)
        case {"kind": ("char" | "gpt2" | "tokenizer.json") as kind}:
            raise ValueError(
                f"tokenizer: malformed spec of kind {kind!r}, with fields {sorted(spec)}; "
                "use one as Tokenizer.spec() made it"
            )
        case _:
            raise ValueError(
                f"tokenizer: unknown kind {spec.get('kind')!r}, expected 'char', 'gpt2' or "
                "'tokenizer.json'; the spec may come from a newer version of eqx_gpt: upgrade"
            )


def _beside(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """What lies beside a tokenizer.json, from these fields of a spec; None if malformed."""
    match {"special_tokens": {}, "stop_tokens": [], "chat_template": None, **fields}:
        case {
            "special_tokens": dict(special),
            "stop_tokens": list(stops),
            "chat_template": (str() | None) as template,
            **rest,
        } if not rest and all(isinstance(x, str) for x in [*special.values(), *stops]):
            stops = tuple(stops)
            return {"special_tokens": special, "stop_tokens": stops, "chat_template": template}
    return None


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether ids mean the same text in both, also where the two are described differently.

    Judged by some thousand ids over the whole vocabulary.
    """
    if fingerprint(a) == fingerprint(b):
        return True
    if a.vocab_size != b.vocab_size:
        return False
    ids = range(0, a.vocab_size, max(1, a.vocab_size // 2000))
    return all(a.decode([i]) == b.decode([i]) for i in ids)


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of the spec's canonical JSON: equal exactly where two tokenizers are the same."""
    canonical = json.dumps(tokenizer.spec(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _gpt2_ranks() -> dict[bytes, int]:
    """Token -> id. GPT-2's ids need no table: 256 bytes first, then one token a merge, in order."""
    data = importlib.resources.files("eqx_gpt").joinpath("data/gpt2_vocab.bpe").read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != GPT2_VOCAB_BPE_SHA256:
        raise ValueError(
            f"eqx_gpt/data/gpt2_vocab.bpe has sha256 {found}, expected {GPT2_VOCAB_BPE_SHA256}; "
            "restore it byte for byte (line ends included), or install eqx_gpt again"
        )
    # The file writes each byte as one printable character; bytes that have none of their own
    # take U+0100 and up. Ids of single bytes follow the same order: printable ones first.
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokens = [bytes([b]) for b in printable + others]
    for line in data.decode("utf-8").splitlines()[1:]:
        tokens.append(bytes(byte_of[character] for character in line.replace(" ", "")))
    return {token: rank for rank, token in enumerate(tokens)}


def _code_points(text: str) -> UInt32[np.ndarray, " characters"]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32)


def _without_surrogates(text: str) -> str:
    """Pairs joined, and lone surrogates, which no UTF-8 can hold, replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _checked_ids(ids: Iterable[SupportsIndex], vocab_size: int) -> list[int]:
    checked = [index(i) for i in ids]
    for position, i in enumerate(checked):
        if not 0 <= i < vocab_size:
            raise ValueError(
                f"decode: id {i} at position {position} is outside the tokenizer's vocabulary of "
                f"{vocab_size}, 0 to {vocab_size - 1}; mask such ids when sampling"
            )
    return checked


def _shortened(characters: str, limit: int = 100) -> str:
    if len(characters) <= limit:
        return repr(characters)
    return f"{characters[:limit]!r} and {len(characters) - limit} more"
