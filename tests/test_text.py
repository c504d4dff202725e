"""Text in and out: prompts as a model expects them, new tokens as whole characters."""

import json

import jax
import numpy as np
import pytest
from architectures import ARCHITECTURES, lively

from eqx_gpt import GPT, GPTConfig, complete, generate, stream_text
from eqx_gpt.text import TextStream, end_ids, prompt_ids
from eqx_gpt.tokenizer import CharTokenizer, GPT2Tokenizer, JSONTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

HARD = "Grüße, 東京! 👩‍👩‍👧‍👦 नमस्ते \ufffd é ﷺ\n\n  end"


def pieces_of(stream: TextStream, ids: list[int], size: int) -> list[str]:
    parts = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*parts, stream.finish()]


def bytes_tokenizer() -> JSONTokenizer:
    """A vocabulary of bytes, as SentencePiece falls back to, with a begin and two ends."""
    vocab = {"<s>": 0, "</s>": 1, "<end>": 2, "▁": 3, "a": 4}
    vocab |= {f"<0x{i:02X}>": 5 + i for i in range(256)}
    special = [{"id": i, "content": token, "special": True, "normalized": False, "lstrip": False,
                "rstrip": False, "single_word": False}
               for i, token in enumerate(("<s>", "</s>", "<end>"))]  # fmt: skip
    begin = {"id": "<s>", "ids": [0], "tokens": ["<s>"]}
    text = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": begin},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True,
                  "unk_token": "<s>"},
    }  # fmt: skip
    return JSONTokenizer(json.dumps(text), "</s>", {"bos_token": "<s>"}, ("<end>",))


@pytest.mark.parametrize("tokenizer", [GPT2Tokenizer(), bytes_tokenizer()], ids=["gpt2", "bytes"])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_are_whole_and_make_the_text(tokenizer: GPT2Tokenizer, size: int) -> None:
    text = HARD.replace("\ufffd", "?") * 20  # long enough for old tokens to be forgotten
    prompt, ids = tokenizer.encode("Tokyo:"), tokenizer.encode(text)
    pieces = pieces_of(TextStream(tokenizer, prompt), ids, size)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(text) / 4 / size


def test_any_tokens_make_the_text_that_they_decode_to() -> None:
    tokenizer, rng = GPT2Tokenizer(), np.random.default_rng(0)
    prompt = tokenizer.encode("So:")
    for _ in range(50):
        ids = rng.integers(0, 300, 40).tolist()  # mostly bytes, which make no characters
        ids[5:5] = tokenizer.encode("\ufffd")
        expected = tokenizer.decode([*prompt, *ids]).removeprefix("So:")
        assert "".join(pieces_of(TextStream(tokenizer, prompt), ids, 3)) == expected


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["\n\nUser"], "Hello.\n\nUse it"),
        (["Use"], "Hello.\n\n"),
        (["\n\nUse", "lo."], "Hel"),
        (["it"], "Hello.\n\nUse "),
        (["nothing", "it."], "Hello.\n\nUse it"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_text_ends_before_a_stop_string(stops: list[str], expected: str, size: int) -> None:
    """Never a letter of it is given, but what only looked like it is."""
    text = "Hello.\n\nUse it"
    tokenizer = CharTokenizer.from_text(text + "ser")
    stream = TextStream(tokenizer, [0], stop_strings=stops)
    pieces = pieces_of(stream, tokenizer.encode(text), size)
    assert "".join(pieces) == expected
    assert stream.ended


def test_text_ends_before_an_end_token() -> None:
    tokenizer = GPT2Tokenizer()
    ids = [*tokenizer.encode("one"), 50256, *tokenizer.encode("two")]
    stream = TextStream(tokenizer, [1], ends=[50256])
    assert (stream.add(ids[:1]), stream.ended) == ("one", False)
    assert (stream.add(ids[1:]), stream.ended) == ("", True)
    assert (stream.add([3]), stream.finish()) == ("", "")
    with pytest.raises(ValueError, match="a stop string is empty; give some text"):
        TextStream(tokenizer, [1], stop_strings=["a", ""])


def test_prompts_begin_as_the_model_expects() -> None:
    tokenizer = bytes_tokenizer()
    assert tokenizer.prefix == (0,)
    assert prompt_ids(tokenizer, "a a") == [0, 4, 3, 4]
    assert prompt_ids(tokenizer, "<s>a") == [0, 4]
    assert prompt_ids(tokenizer, "") == [0]
    assert GPT2Tokenizer().prefix == CharTokenizer("a").prefix == ()
    assert prompt_ids(GPT2Tokenizer(), "a<|endoftext|>") == [64, 50256]
    with pytest.raises(ValueError, match="the prompt is empty; give it some text"):
        prompt_ids(GPT2Tokenizer(), "")


def test_ends_are_those_that_the_model_has() -> None:
    tokenizer = bytes_tokenizer()
    assert end_ids(tokenizer, GPTConfig(vocab_size=261)) == [1, 2]
    assert end_ids(tokenizer, GPTConfig(vocab_size=2)) == [1]
    assert end_ids(CharTokenizer("ab"), GPTConfig()) == []


def test_completions_are_what_generate_says() -> None:
    """A batch of unlike prompts, and one of them streamed; each to its end token or stop string."""
    config = ARCHITECTURES["gpt2"]
    alphabet = "".join(chr(ord("A") + i) for i in range(config.vocab_size))
    model, tokenizer = lively(config), CharTokenizer(alphabet)
    prompts = ["ABC", "XQ", "Z"]
    free = [
        tokenizer.decode(generate(model, tokenizer.encode(p), 17, temperature=0.0))[len(p) :]
        for p in prompts
    ]
    settings = {"temperature": 0.0}
    assert complete(model, tokenizer, prompts, 17, **settings) == free
    stop = free[0][5:7]
    expected = [text.split(stop)[0] for text in free]
    found = complete(model, tokenizer, prompts, 17, stop_strings=[stop], **settings)
    assert found == expected
    assert len(found[0]) <= 5
    pieces = stream_text(model, tokenizer, "ABC", 17, stop_strings=[stop], chunk=2, **settings)
    assert "".join(pieces) == expected[0]
    pieces = list(stream_text(model, tokenizer, "ABC", 17, chunk=2, **settings))
    assert len(pieces) == 9
    assert "".join(pieces) == free[0]


def test_settings_are_checked_before_the_first_piece() -> None:
    model = GPT.init(ARCHITECTURES["gpt2"], key=jax.random.key(0))
    tokenizer = CharTokenizer("abc")
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        stream_text(model, tokenizer, "a", temperature=0.0, top_k=0)
    with pytest.raises(ValueError, match="sampling needs key"):
        complete(model, tokenizer, ["a"])
