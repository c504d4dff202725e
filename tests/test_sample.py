"""scripts/sample.py: samples, lines and conversations, and what it does with a user's mistakes."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from architectures import ARCHITECTURES, lively
from test_text import bytes_tokenizer
from tiny_run import command

from eqx_gpt import GPT, generate
from eqx_gpt.text import prompt_ids
from eqx_gpt.tokenizer import CharTokenizer, JSONTokenizer
from scripts.sampling import modes
from scripts.sampling.arguments import Arguments
from scripts.sampling.speaker import Speaker
from weights import save_pretrained

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def letters() -> tuple[GPT, CharTokenizer]:
    """A model of letters, and of ids beyond them that mean nothing."""
    model = lively(ARCHITECTURES["gpt2"])
    return model, CharTokenizer("".join(chr(ord("A") + i) for i in range(29)))


@pytest.fixture(scope="module")
def talker() -> tuple[GPT, JSONTokenizer]:
    """A model of bytes with a template, that ends its turn now and then."""
    tokenizer = dataclasses.replace(bytes_tokenizer(), chat_template=TEMPLATE)
    config = dataclasses.replace(ARCHITECTURES["gptj"], vocab_size=261, block_size=97)
    model = lively(config)
    assert model.head is not None
    bias = model.head.bias
    return eqx.tree_at(lambda m: m.head.bias, model, bias.at[2].set(5.0)), tokenizer


def continued(model: GPT, ids: list[int], n_new: int, **settings: Any) -> list[int]:
    return np.asarray(generate(model, ids, n_new, **settings))[len(ids) :].tolist()


def test_samples_are_drawn_together_or_as_they_come(
    letters: tuple[GPT, CharTokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = letters
    speaker = Speaker(model, tokenizer, Arguments(num_samples=5, batch_size=2, max_new_tokens=30))
    modes.samples(speaker, "AB")
    out, err = capsys.readouterr()
    texts = out.splitlines()
    assert [len(text) for text in texts] == [32] * 5
    assert all(text.startswith("AB") for text in texts)
    assert len(set(texts)) == 5
    assert set("".join(texts)) <= set(tokenizer.characters)  # 31 ids, 29 letters
    assert err == "---------------\n" * 4

    greedy = Arguments(num_samples=1, max_new_tokens=9, temperature=0.0, top_k=None)
    modes.samples(Speaker(model, tokenizer, greedy), "AB")
    whole = capsys.readouterr().out
    modes.samples(Speaker(model, tokenizer, dataclasses.replace(greedy, num_samples=2)), "AB")
    assert capsys.readouterr().out == 2 * whole
    stop = dataclasses.replace(greedy, stop=(whole[5:7],))
    modes.samples(Speaker(model, tokenizer, stop), "AB")
    assert capsys.readouterr().out == whole[: whole.index(whole[5:7], 2)] + "\n"


@pytest.mark.parametrize("together", [1, 2])
def test_logprobs_are_the_models_own(
    talker: tuple[GPT, JSONTokenizer], tmp_path: Path, together: int
) -> None:
    """At temperature 1 and unfiltered, however it was drawn, and to the end of each text alone."""
    model, tokenizer = talker
    file = tmp_path / "logprobs.jsonl"
    options = Arguments(
        num_samples=6, batch_size=together, max_new_tokens=23, temperature=1.3, logprobs=file
    )
    modes.samples(Speaker(model, tokenizer, options), "ab")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 6
    prompt = prompt_ids(tokenizer, "ab")
    for sample in samples:
        tokens = sample["tokens"]
        ends = [token in (1, 2) for token in tokens]
        assert not any(ends[:-1])
        assert ends[-1] or len(tokens) == 23
        logits = model(np.array([prompt + tokens], np.int32))[0, len(prompt) - 1 : -1]
        logits = np.asarray(logits[:, : tokenizer.vocab_size], np.float64)
        expected = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        expected = expected[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(sample["logprobs"], expected, atol=2e-5)
    assert any(len(sample["tokens"]) < 23 for sample in samples)


def test_a_reader_that_leaves_is_no_error(letters: tuple[GPT, CharTokenizer]) -> None:
    program = (
        "import scripts.common as c; c.run_command(lambda: [print('x') for _ in range(10**6)])"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        reader.stdout.readline()
        reader.stdout.close()
        assert reader.stderr.read() == b""


def test_every_line_is_continued(
    letters: tuple[GPT, CharTokenizer],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = letters
    monkeypatch.setattr(sys, "stdin", io.StringIO("ABC\n\nXY"))
    speaker = Speaker(model, tokenizer, Arguments(max_new_tokens=7, temperature=0.0))
    modes.interactive(speaker)
    out, err = capsys.readouterr()
    restricted = model.with_config(dataclasses.replace(model.config, n_token=29))
    expected = [
        text + tokenizer.decode(continued(restricted, tokenizer.encode(text), 7, temperature=0.0))
        for text in ("ABC", "XY")
    ]
    assert out.splitlines() == expected
    assert err == ""


def test_a_conversation_is_that_of_the_template(
    talker: tuple[GPT, JSONTokenizer],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Turn by turn, to the end of each; the oldest ones leave when there is no room."""
    model, tokenizer = talker
    options = Arguments(chat=True, system="S", max_new_tokens=12, temperature=1.0, top_k=None)
    questions = ["one?", "two", "three three", "four"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    modes.chat(Speaker(model, tokenizer, options), "it")
    out, err = capsys.readouterr()

    expected, said, left_out = "", [], 0
    for turn, question in enumerate(questions):
        said.append(f"<s>user:{question}<end>")
        while True:
            text = "<s>system:S<end>" + "".join(said) + "<s>assistant:"
            ids = tokenizer.encode(text, special="token")
            if len(ids) + 12 <= 97:
                break
            said, left_out = said[2:], left_out + 1
        key = jax.random.fold_in(jax.random.key(options.seed), turn)
        new = continued(model, ids, 12, key=key, stop=[1, 2])
        # After an "a", as in the middle of a text: at the beginning a space would be stripped.
        answer = tokenizer.decode([4, *(i for i in new if i not in (1, 2))])[1:]
        said.append(f"<s>assistant:{answer}<end>")
        expected += answer + "\n"
    assert out == expected
    assert err.count("left out") == left_out > 0
    lengths = [len(tokenizer.encode(line)) for line in expected.split("\n")]
    assert min(lengths[:-1]) < 12  # an end of turn came


def test_chat_as_a_command(talker: tuple[GPT, JSONTokenizer], tmp_path: Path) -> None:
    """Also with a draft: itself, which changes nothing when greedy."""
    model, tokenizer = talker
    save_pretrained(model, tmp_path, tokenizer=tokenizer)
    flags = {"init_from": ".", "max_new_tokens": 9, "temperature": 0, "draft": "."}
    asked = [*command("sample.py", "--chat", **flags), "--stop", "Q", "--stop", "R"]
    found = subprocess.run(
        asked, cwd=tmp_path, input="hi\nho\n", text=True, capture_output=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    ids = tokenizer.encode("<s>user:hi<end><s>assistant:", special="token")
    new = continued(model, ids, 9, temperature=0.0, stop=[1, 2])
    answer = tokenizer.decode([4, *(i for i in new if i not in (1, 2))])[1:]
    for stop in ("Q", "R"):
        answer = answer.split(stop)[0]
    assert found.stdout.startswith(answer + "\n")
    assert found.stderr == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"chat": True, "interactive": True}, "both read standard input; give one of them"),
        ({"system": "Be."}, "--system is for a conversation; give --chat as well"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"n_draft": -1}, "n_draft must be at least 1, got -1"),
    ],
)
def test_refused_settings(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Arguments(**flags)


def test_nothing_is_printed_before_a_mistake_is_found(
    letters: tuple[GPT, CharTokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = Speaker(*letters, Arguments(num_samples=1, top_p=2.0))
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 2.0"):
        modes.samples(speaker, "AB")
    assert capsys.readouterr().out == ""


def test_refused_models(letters: tuple[GPT, CharTokenizer], tmp_path: Path) -> None:
    model, tokenizer = letters
    with pytest.raises(ValueError, match="nobody has no chat template"):
        modes.chat(Speaker(model, tokenizer, Arguments(chat=True)), "nobody")
    save_pretrained(model, tmp_path, tokenizer=CharTokenizer("abc"))
    with pytest.raises(ValueError, match="has another tokenizer than the model"):
        Speaker(model, tokenizer, Arguments(draft=str(tmp_path)))


def test_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert Arguments(start="-").prompt() == "two\nlines\n"
    (tmp_path / "x.txt").write_text("é\n", encoding="utf-8")
    assert Arguments(start=f"FILE:{tmp_path}/x.txt").prompt() == "é\n"
    assert Arguments(start="plain").prompt() == "plain"
