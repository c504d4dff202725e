"""GPT-2's tokenizer against transformers', on hard text."""

import random

import pytest
from transformers import GPT2Tokenizer as Oracle

import eqx_gpt.tokenizer as module
from eqx_gpt.tokenizer import GPT2Tokenizer

HARD = [
    "",
    "<|endoftext|>",
    "a <|endoftext|> b<|endoftext|><|endoftext|>\n",
    "<|endoftext|",
    "😀 👩‍👩‍👧‍👦 🇩🇪🇯🇵 ✊🏿",
    "漢字とかな 한국어 中文\uff0c标点。",
    "العربية ﷽ עִבְרִית ไทย हिन्दी",
    " ",
    "  \t \t\t\n \r\n\r\n   ",
    "a    b\n\n\n    c \n",
    "\u00a0\u2003\u3000\u2028\u200b\ufeff x",
    "".join(map(chr, range(0x250))),
    "\x00\x01\x1b[0m\x7f\x80\x9f",
    "I'll you've He'd she's I'm they're can't I'LL 'tis '' '",
    "1234567890 ١٢٣ ½ Ⅷ x²",
    "e\u0301 é ﬁ ß İ \u0131",
    "Ġ Ċ ĠĠ",
    "a" * 3000,
    " " * 3000,
    "\U0010ffff\ue000\ufffd\ufffe",
]


@pytest.fixture(scope="module")
def ours() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """Its vocabulary is read off our merges; tests/test_tokenizer.py shows it to be OpenAI's."""
    own = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in own]
    character = {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(rest)}
    ranks = module._gpt2_ranks()
    vocab = {"".join(character[b] for b in token): rank for token, rank in ranks.items()}
    path = module.importlib.resources.files("eqx_gpt").joinpath("data/gpt2_vocab.bpe")
    merges = [tuple(line.split()) for line in path.read_text("utf-8").splitlines()[1:]]
    return Oracle(vocab=vocab | {"<|endoftext|>": 50256}, merges=merges)


def random_texts(count: int) -> list[str]:
    """Strings that mix words, runs of white space, specials and code points of every plane."""
    rng = random.Random(0)

    def piece() -> str:
        match rng.randrange(7):
            case 0:
                return "".join(rng.choices("etaoin shrdlu'", k=rng.randrange(12)))
            case 1:
                return rng.choice([" ", "\n", "\t", "\r\n", "\u00a0"]) * rng.randrange(1, 9)
            case 2:
                return str(rng.randrange(10 ** rng.randrange(1, 12)))
            case 3:
                return rng.choice(["<|endoftext|>", "<|", "|>", "'ll", "'S", "...", "://", "Ġ"])
            case 4:
                return chr(rng.randrange(0x300))
            case 5:
                return chr(rng.choice([0x4E00, 0x3040, 0x600, 0x1F600]) + rng.randrange(80))
            case _:
                point = rng.randrange(0x110000 - 0x800)
                return chr(point + 0x800 if point >= 0xD800 else point)

    return ["".join(piece() for _ in range(rng.randrange(1, 20))) for _ in range(count)]


@pytest.mark.parametrize("special", ["text", "token"])
def test_against_gpt2(special: str, ours: GPT2Tokenizer, oracle: Oracle) -> None:
    for text in HARD + random_texts(4000):
        expected = oracle.encode(text, split_special_tokens=special == "text")
        assert ours.encode(text, special=special) == expected, repr(text)
        assert ours.decode(expected) == oracle.decode(expected, clean_up_tokenization_spaces=False)
    batch = ours.encode_batch(HARD, threads=2)
    assert [ids.tolist() for ids in batch] == oracle(HARD, split_special_tokens=True)["input_ids"]
