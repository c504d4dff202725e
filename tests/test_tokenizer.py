"""Tokenizers against known ids, against OpenAI's own table, and through their specs."""

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import tokenizers

import eqx_gpt.tokenizer as module
from eqx_gpt.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    JSONTokenizer,
    Tokenizer,
    fingerprint,
    tokenizer_from_spec,
)

ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

HARD = "naïve 😀👩‍👩‍👧 漢字かな \t\t  \r\n\n  x\x00\x7f\u200b <|endoftext|>'ll I'LL 1234567 ﷽\u0301"


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    """A small byte-level BPE whose file also asks for truncation, padding and a first token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the theory of the other then"], trainer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer.to_str()


@pytest.fixture(params=["char", "gpt2", "tokenizer.json"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_json: str) -> Tokenizer:
    makers: dict[str, Callable[[], Tokenizer]] = {
        "char": lambda: CharTokenizer.from_text(HARD),
        "gpt2": GPT2Tokenizer,
        "tokenizer.json": lambda: JSONTokenizer(tokenizer_json, "<|endoftext|>"),
    }
    return makers[request.param]()


def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(HARD)
    assert tokenizer.decode(ids) == HARD
    assert tokenizer.decode(np.array(ids)) == HARD
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_a_batch_equals_its_texts(tokenizer: Tokenizer) -> None:
    texts = [HARD, "", HARD[::-1], HARD * 50]
    batch = tokenizer.encode_batch(texts, threads=3)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert {ids.dtype for ids in batch} == {np.dtype("uint32")}


def test_a_spec_rebuilds_the_tokenizer(tokenizer: Tokenizer) -> None:
    again = tokenizer_from_spec(json.loads(json.dumps(tokenizer.spec())))
    assert again == tokenizer
    assert fingerprint(again) == fingerprint(tokenizer)
    assert again.encode(HARD) == tokenizer.encode(HARD)
    assert again.end_of_text == tokenizer.end_of_text
    assert isinstance(again, Tokenizer)


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for bad in (tokenizer.vocab_size, -1):
        with pytest.raises(ValueError, match=rf"id {bad} at position 1 .* {tokenizer.vocab_size}"):
            tokenizer.decode([0, bad])


def test_fingerprints_tell_tokenizers_apart(tokenizer_json: str) -> None:
    several = [
        CharTokenizer("ab"),
        CharTokenizer("abc"),
        GPT2Tokenizer(),
        JSONTokenizer(tokenizer_json),
        JSONTokenizer(tokenizer_json, "<|endoftext|>"),
    ]
    assert len({fingerprint(tokenizer) for tokenizer in several}) == len(several)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "unknown kind None"),
        ({"kind": "sentencepiece"}, "unknown kind 'sentencepiece', expected 'char', 'gpt2'"),
        ({"kind": "char"}, "malformed spec of kind 'char'"),
        ({"kind": "char", "characters": "ab", "lower": True}, "malformed spec of kind 'char'"),
        ({"kind": "char", "characters": "ba"}, "distinct, sorted"),
        ({"kind": "gpt2", "vocab_bpe_sha256": "00"}, "merges with sha256 00 were asked for"),
        (
            {"kind": "tokenizer.json", "tokenizer_json": "{", "end_of_text_token": None},
            "not a Hugging Face tokenizer.json",
        ),
    ],
)
def test_a_wrong_spec_is_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_spec(spec)


def test_characters_are_numbered_in_order() -> None:
    tokenizer = CharTokenizer.from_text("banana\n")
    assert tokenizer.characters == "\nabn"
    assert tokenizer.encode("nab") == [3, 1, 2]
    assert tokenizer.vocab_size == 4
    assert tokenizer.end_of_text is None


@pytest.mark.parametrize("unknown", ["é", "\x00", "😀"])
def test_an_unknown_character_is_named(unknown: str) -> None:
    with pytest.raises(ValueError, match=rf"U\+{ord(unknown):04X}\) at position 2 .*'abc'"):
        CharTokenizer("abc").encode(f"ab{unknown}c")


def test_gpt2_known_ids(gpt2: GPT2Tokenizer) -> None:
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" \n\n  the") == [220, 628, 220, 262]
    assert gpt2.vocab_size == 50257
    assert gpt2.end_of_text == 50256


def test_gpt2_end_of_text_is_text_or_token(gpt2: GPT2Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert gpt2.encode(text) == gpt2.encode("a<|") + gpt2.encode("endoftext|>b")
    assert gpt2.encode(text, special="token") == [64, 50256, 65]
    assert gpt2.decode([64, 50256, 65]) == text


def test_gpt2_table_is_openais() -> None:
    """The ids derived from the merges, written as OpenAI wrote them, are their encoder.json."""
    own = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in own]
    character = {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(rest)}
    ranks = module._gpt2_ranks()
    table = {"".join(character[b] for b in token): rank for token, rank in ranks.items()}
    text = json.dumps(table | {"<|endoftext|>": 50256})
    assert hashlib.sha256(text.encode()).hexdigest() == ENCODER_JSON_SHA256


def test_gpt2_any_text_survives(gpt2: GPT2Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        points = (rng.randrange(0x10FFFF) for _ in range(rng.randrange(60)))
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert gpt2.decode(gpt2.encode(text)) == text
        assert gpt2.decode(gpt2.encode(text, special="token")) == text


def test_gpt2_takes_lone_surrogates_and_broken_characters(gpt2: GPT2Tokenizer) -> None:
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"
    assert gpt2.decode(gpt2.encode("😀")[:1]) == "\ufffd"


def test_gpt2_long_runs_take_no_long_time(gpt2: GPT2Tokenizer) -> None:
    for text in ("a" * 100_000, " " * 100_000, "\n" * 100_000 + "x", "^" * 100_000):
        assert gpt2.decode(gpt2.encode(text)) == text


def test_damaged_merges_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GPT2_VOCAB_BPE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"gpt2_vocab.bpe has sha256 1ce166.*, expected 0000"):
        GPT2Tokenizer().encode("a")


def test_json_specials_are_text_or_token_and_nothing_is_added(tokenizer_json: str) -> None:
    tokenizer = JSONTokenizer(tokenizer_json, "<|endoftext|>")
    assert tokenizer.end_of_text == 1
    text = "the<|endoftext|>the"
    the = tokenizer.encode("the")
    assert tokenizer.encode(text, special="token") == [*the, 1, *the]
    assert 1 not in tokenizer.encode(text)
    assert tokenizer.decode([*the, 1]) == "the<|endoftext|>"
    assert len(tokenizer.encode("qqqqq")) == 5


def test_json_without_or_with_an_unknown_end(tokenizer_json: str) -> None:
    assert JSONTokenizer(tokenizer_json).end_of_text is None
    with pytest.raises(ValueError, match="'<eos>' is not in the vocabulary"):
        JSONTokenizer(tokenizer_json, "<eos>")


def test_tokenizer_libraries_are_imported_only_when_used() -> None:
    code = (
        "import sys, eqx_gpt.tokenizer as t; t.GPT2Tokenizer(); t.CharTokenizer('a').encode('a');"
        "print({'tiktoken', 'tokenizers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
