"""Conversations as datasets: what is written, what is refused."""

import hashlib
import json
import sys

import numpy as np
import pytest
from chat_templates import SPECIAL_TOKENS, TEMPLATES, messages_of, tokenizer_json
from tiny_run import ROOT, run

from eqx_gpt.tokenizer import JSONTokenizer, fingerprint
from train.datasets import prepare
from train.manifest import BEGINS, LEARNT, DatasetError, Manifest

TOKENIZER = JSONTokenizer(
    tokenizer_json(), "</s>", SPECIAL_TOKENS, chat_template=TEMPLATES["chatml"]
)
SYSTEM = "<|start|>system\nBe brief.<|end|>\n"


def conversation(i):
    turns = [("user", f"How much is {i}?"), ("assistant", f"It is the {i}, an é."), ("user", "So?")]
    return messages_of([*turns, ("assistant", "So.")] if i % 3 else turns)


def write(path, conversations):
    lines = [json.dumps({"messages": messages, "id": 1}) for messages in conversations]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def make(place, *, name="mine", n=37, tokenizer=TOKENIZER, **options):
    file = write(place / "a.jsonl", map(conversation, range(n)))
    return prepare("messages", place, name=name, files=[file], tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("messages"), val_fraction=0.3)


def test_every_conversation_is_a_document_whose_answers_are_learnt(data):
    found = {}
    for split in ("train", "val"):
        tokens, flags = data.tokens(split), data.flags(split)
        begins = np.flatnonzero(flags & BEGINS)
        assert data.splits[split].flags.documents == len(begins) > 5
        assert data.splits[split].flags.learnt == np.sum(flags & LEARNT)
        for document, of_it in zip(
            np.split(tokens, begins[1:]), np.split(flags, begins[1:]), strict=True
        ):
            said = TOKENIZER.decode(document[(of_it & LEARNT) > 0])
            found[TOKENIZER.decode(document)] = said
    expected = {}
    for i in range(37):
        said = [m["content"] + "<|end|>" for m in conversation(i) if m["role"] == "assistant"]
        turns = [f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in conversation(i)]
        expected[SYSTEM + "".join(turns)] = "".join(said)
    assert found == expected
    assert sum(split.bytes for split in data.splits.values()) == sum(
        len(text.encode()) for text in expected
    )


def test_the_manifest_tells_of_it_and_goes_to_json_and_back(data):
    meta = json.loads((data.directory / "meta.json").read_text())
    assert meta["format_version"] == 2
    flags = (data.directory / "train.flags.bin").read_bytes()
    assert meta["splits"]["train"]["flags"]["sha256"] == hashlib.sha256(flags).hexdigest()
    assert len(flags) == data.splits["train"].tokens
    assert Manifest.read(data.directory) == data
    assert data.tokenizer() == TOKENIZER
    assert data.tokenizer_fingerprint == fingerprint(TOKENIZER)
    assert data.source["corpus"] == "messages"
    assert data.source["conversations"] == 37


def test_a_copy_of_a_conversation_is_in_the_same_split(tmp_path):
    file = write(tmp_path / "a.jsonl", [conversation(i % 7) for i in range(70)])
    data = prepare(
        "messages", tmp_path, name="m", files=[file], tokenizer=TOKENIZER, val_fraction=0.5
    )
    documents = [data.splits[split].flags.documents for split in ("train", "val")]
    assert sum(documents) == 70
    assert all(n % 10 == 0 for n in documents)


def test_text_has_no_flags(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 20)
    data = prepare("text", tmp_path, name="t", files=[tmp_path / "a.txt"], tokenizer="char")
    assert data.flags("train") is None
    meta = json.loads((data.directory / "meta.json").read_text())
    assert meta["format_version"] == 1
    assert set(meta["splits"]["train"]) == {"tokens", "bytes", "sha256"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "val.flags.bin").unlink(), r"val\.flags\.bin does not exist"),
        (lambda d: (d / "val.flags.bin").write_bytes(b"\1"), r"val\.flags\.bin has 1 bytes"),
        (
            lambda d: (d / "train.flags.bin").write_bytes(
                bytes((d / "train.flags.bin").stat().st_size)
            ),
            r"train\.flags\.bin has sha256",
        ),
        (
            lambda d: (d / "meta.json").write_text(
                (d / "meta.json").read_text().replace('"learnt"', '"learned"')
            ),
            "field 'learnt' is None, expected int",
        ),
        (
            lambda d: (d / "meta.json").write_text(
                (d / "meta.json").read_text().replace('"format_version": 2', '"format_version": 3')
            ),
            "format_version 3, expected 1 or 2",
        ),
    ],
)
def test_damage_is_refused(tmp_path, damage, words):
    damage(make(tmp_path).directory)
    with pytest.raises(DatasetError, match=rf"{words}.*scripts/prepare.py") as error:
        Manifest.read(tmp_path / "mine")
    if "meta" not in words and "field" not in words and "format" not in words:
        assert "messages --files FILES --name mine --tokenizer MODEL" in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON in UTF-8"),
        ("[]", r"found \[\], expected \{\"messages\""),
        ('{"messages": []}', r"found \{'messages': \[\]\}, expected"),
        ('{"messages": [{"role": "user"}]}', r"found the message \{'role': 'user'\}"),
        ('{"messages": [{"role": "user", "content": ["Hi"]}]}', "found the message"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "no message of the role 'assistant'"),
        ('{"messages": [{"role": "assistant", "content": "\\ud83d"}]}', "half a surrogate"),
    ],
)
def test_a_line_that_is_no_conversation_is_named_and_nothing_written(tmp_path, line, words):
    file = write(tmp_path / "a.jsonl", map(conversation, range(3)))
    with file.open("a") as lines:
        lines.write(line + "\n")
    with pytest.raises(DatasetError, match=rf"a\.jsonl, line 6: {words}"):
        prepare("messages", tmp_path, name="m", files=[file], tokenizer=TOKENIZER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": None}, "messages needs the files, a name .* --tokenizer MODEL"),
        ({"tokenizer": "gpt2"}, "gpt2 has no chat template"),
        ({"tokenizer": JSONTokenizer(tokenizer_json())}, "^--tokenizer has no chat template"),
        ({"name": None}, "messages needs"),
        ({"source": "x"}, "--source does not apply to messages"),
        ({"val_fraction": 1e-9}, "val split would have 0 tokens"),
    ],
)
def test_what_else_is_refused(tmp_path, options, words):
    with pytest.raises(DatasetError, match=words):
        make(tmp_path, **options)
    assert not (tmp_path / "mine").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"--files .*b\.jsonl is no file"):
        prepare("messages", tmp_path, name="m", files=[tmp_path / "b.jsonl"], tokenizer=TOKENIZER)


def test_the_command(tmp_path):
    """With a tokenizer.json and the template beside it; the second time there is nothing to do."""
    write(tmp_path / "a.jsonl", map(conversation, range(37)))
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL_TOKENS))
    argv = [sys.executable, str(ROOT / "scripts" / "prepare.py"), "messages", "--name", "mine"]
    argv += ["--files", "a.jsonl", "--tokenizer", "tokenizer.json", "--val_fraction", "0.3"]
    done = run(argv, tmp_path)
    assert done.returncode == 0, done.stderr
    data = Manifest.read(tmp_path / "data" / "mine")
    assert data.splits["train"].flags.documents + data.splits["val"].flags.documents == 37
    assert "ready" in run(argv, tmp_path).stderr
