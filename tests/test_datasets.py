"""Datasets: what is written, what is refused, and what survives interruptions of every kind."""

import errno
import hashlib
import http.server
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from eqx_gpt.tokenizer import CharTokenizer, GPT2Tokenizer, JSONTokenizer, fingerprint
from train import corpora, files, manifest, streaming
from train.datasets import is_prepared, prepare
from train.manifest import CORPORA, DatasetError, DatasetWriter, Manifest

ROOT = Path(__file__).resolve().parent.parent
PREPARE = ROOT / "scripts" / "prepare.py"
END = 50256


def listing(directory: Path) -> list[str]:
    """Every file and folder below, hidden ones too."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def tree_hashes(directory: Path) -> dict[str, str]:
    return {
        name: files.sha256_of(directory / name) for name in ("train.bin", "val.bin", "meta.json")
    }


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("The quick brown fox, naïve as ever ☃.\n" * 20, encoding="utf-8")
    return path


@pytest.fixture
def dataset(tmp_path: Path, text_file: Path) -> Path:
    return prepare("text", tmp_path / "data", files=[text_file], name="mine").directory


# --- what is written --------------------------------------------------------------------------


def test_own_text_as_gpt2_tokens(tmp_path: Path, text_file: Path, dataset: Path) -> None:
    text = text_file.read_text(encoding="utf-8")
    found = Manifest.read(dataset)
    at = int(len(text) * 0.9)
    tokenizer = GPT2Tokenizer()
    for split, part in (("train", text[:at]), ("val", text[at:])):
        tokens = found.tokens(split)
        assert tokens.tolist() == [*tokenizer.encode(part), END]
        assert found.splits[split].tokens == len(tokens)
        assert found.splits[split].bytes == len(part.encode("utf-8"))
        assert (dataset / f"{split}.bin").read_bytes() == tokens.astype("<u2").tobytes()
    assert found.name == "mine"
    assert found.dtype == "uint16"
    assert found.vocab_size == 50257
    assert found.tokenizer() == tokenizer
    assert found.tokenizer_fingerprint == fingerprint(tokenizer)
    assert found.to_dict() == json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    assert listing(tmp_path / "data") == [
        "mine",
        *(f"mine/{f}" for f in sorted(["meta.json", "train.bin", "val.bin"])),
    ]


def test_own_text_as_characters_over_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "junk").write_bytes(b"\xff")
    (folder / "deep" / "z.md").write_bytes("\ufeffzzzz\r\nzzzz".encode())
    (folder / "b.txt").write_text("bbbbbbbbbb")
    (tmp_path / "a.txt").write_text("aaaaaaaaaa")
    given = [tmp_path / "a.txt", folder, folder / "b.txt"]
    found = prepare("text", tmp_path, files=given, name="m", tokenizer="char", val_fraction=0.2)
    tokenizer = found.tokenizer()
    assert tokenizer == CharTokenizer("\n\rabz")
    assert tokenizer.decode(found.tokens("train")) == "a" * 8 + "b" * 8 + "zzzz\r\nzz"
    assert tokenizer.decode(found.tokens("val")) == "aabbzz"


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path, text_file: Path) -> None:
    words = {f"w{i}": i for i in range(70_000)}
    words |= {text: 70_000 + i for i, text in enumerate(["fox", "<|endoftext|>"])}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "fox"}
    added = {"id": 70_001, "content": "<|endoftext|>", "special": True, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({
        "version": "1.0", "model": model, "added_tokens": [added],
        "pre_tokenizer": {"type": "Whitespace"},
    }))  # fmt: skip
    found = prepare("text", tmp_path, files=[text_file], name="m", tokenizer=str(path))
    assert found.dtype == "uint32"
    assert found.tokens("train").max() == 70_001
    assert found.tokens("train")[-1] == 70_001
    assert isinstance(found.tokenizer(), JSONTokenizer)
    # A tokenizer itself is as good as its path, and keeps what no tokenizer.json says.
    tokenizer = JSONTokenizer(path.read_text(), None, {"unk_token": "fox"}, chat_template="{{ x }}")
    given = prepare("text", tmp_path, files=[text_file], name="g", tokenizer=tokenizer)
    assert given.tokenizer() == tokenizer


def test_stdlib(tmp_path: Path) -> None:
    start = time.monotonic()
    found = prepare("stdlib", tmp_path)
    assert time.monotonic() - start < 15
    train, val = found.tokens("train"), found.tokens("val")
    assert len(train) > 3_000_000
    assert 0.005 < len(val) / len(train) < 0.1
    assert train[-1] == val[-1] == END
    assert (train == END).sum() + (val == END).sum() == found.source["files"]
    text = found.tokenizer().decode(train)
    assert text.isprintable() is False
    assert "class OrderedDict(dict):" in text
    assert "class TestCase(unittest.TestCase)" not in text
    assert found.source["python"] == sys.version.split()[0]


def test_shakespeare_has_65_characters() -> None:
    assert CharTokenizer(corpora.SHAKESPEARE_CHARACTERS).vocab_size == 65


def test_shakespeare_splits_as_nanogpt(tmp_path: Path, shakespeare: Path) -> None:
    text = shakespeare.read_text()
    at = int(len(text) * 0.9)
    characters = prepare("shakespeare_char", tmp_path, source=shakespeare)
    assert characters.tokenizer().decode(characters.tokens("train")) == text[:at]
    assert characters.tokenizer().decode(characters.tokens("val")) == text[at:]
    gpt2 = prepare("shakespeare", tmp_path, source=shakespeare)
    assert gpt2.tokens("train").tolist() == GPT2Tokenizer().encode(text[:at])
    assert gpt2.splits["val"].bytes == len(text[at:])
    with pytest.raises(DatasetError, match="expected"):
        prepare("shakespeare", tmp_path, source=Path(__file__))


# --- a dataset of the same name ---------------------------------------------------------------


def test_the_same_inputs_are_not_prepared_twice(
    tmp_path: Path, text_file: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (dataset / "train.bin").stat().st_mtime_ns
    prepare("text", tmp_path / "data", files=[text_file], name="mine")
    assert "is ready" in capsys.readouterr().err
    assert (dataset / "train.bin").stat().st_mtime_ns == before


def test_other_inputs_replace_it_only_when_told(
    tmp_path: Path, text_file: Path, dataset: Path
) -> None:
    before = tree_hashes(dataset)
    for other in ({"tokenizer": "char"}, {"val_fraction": 0.3}):
        with pytest.raises(DatasetError, match=r"made of other inputs; .* --overwrite True"):
            prepare("text", tmp_path / "data", files=[text_file], name="mine", **other)
    assert tree_hashes(dataset) == before
    found = prepare(
        "text", tmp_path / "data", files=[text_file], name="mine", tokenizer="char", overwrite=True
    )
    assert found.tokenizer().spec()["kind"] == "char"
    assert [name for name in listing(tmp_path / "data") if "/" not in name] == ["mine"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
def test_an_interruption_leaves_all_as_it_was(
    tmp_path: Path,
    text_file: Path,
    dataset: Path,
    failure: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tree_hashes(dataset), listing(tmp_path)

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(DatasetWriter, "finish", fail)
    for name in ("mine", "another"):
        with pytest.raises(type(failure)):
            prepare("text", tmp_path / "data", files=[text_file], name=name, tokenizer="char",
                    overwrite=True)  # fmt: skip
    assert (tree_hashes(dataset), listing(tmp_path)) == before


# --- verification -----------------------------------------------------------------------------


def edit_meta(directory: Path, **fields: object) -> None:
    path = directory / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "mine does not exist"),
    "no meta": (lambda d: (d / "meta.json").unlink(), "meta.json does not exist"),
    "no token file": (lambda d: (d / "val.bin").unlink(), "val.bin does not exist"),
    "not JSON": (lambda d: (d / "meta.json").write_text("{"), "meta.json is not JSON"),
    "not UTF-8": (lambda d: (d / "meta.json").write_bytes(b"\xff"), "meta.json is not JSON"),
    "a list": (lambda d: (d / "meta.json").write_text("[]"), "format_version None, expected 1"),
    "future": (lambda d: edit_meta(d, format_version=3), "format_version 3, expected 1"),
    "no splits": (lambda d: edit_meta(d, splits={}), "field 'train' is None, expected dict"),
    "dtype": (lambda d: edit_meta(d, dtype="uint8"), "dtype 'uint8', expected 'uint16'"),
    "vocabulary": (lambda d: edit_meta(d, vocab_size=65), "vocab_size 65, expected 50257"),
    "tokenizer": (lambda d: edit_meta(d, tokenizer={"kind": "x"}), "unknown kind 'x'"),
    "fingerprint": (lambda d: edit_meta(d, tokenizer_fingerprint="00"), "fingerprint is 2be4"),
    "cut": (lambda d: os.truncate(d / "train.bin", 100), "has 100 bytes, expected 434"),
    "changed": (
        lambda d: (d / "val.bin").write_bytes((d / "val.bin").read_bytes()[::-1]),
        "val.bin has sha256 .*, expected",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_the_command_that_mends_it(dataset: Path, damage: str) -> None:
    do, message = DAMAGES[damage]
    do(dataset)
    with pytest.raises(DatasetError, match=message) as caught:
        Manifest.read(dataset)
    assert "\n" not in str(caught.value)
    assert "prepare.py text --files FILES --name mine --data_dir" in str(caught.value)
    assert is_prepared(dataset) == (damage not in ("no directory", "no meta"))


def test_large_files_are_verified_by_size(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "HASH_LIMIT_BYTES", 10)
    path = dataset / "val.bin"
    path.write_bytes(path.read_bytes()[::-1])
    Manifest.read(dataset)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match="bytes, expected"):
        Manifest.read(dataset)


def test_the_remedy_names_the_dataset() -> None:
    with pytest.raises(DatasetError, match=r"data/openwebtext does not exist; prepare it: python "
                       r"scripts/prepare.py openwebtext$"):  # fmt: skip
        Manifest.read(Path("data") / "openwebtext")


# --- downloads --------------------------------------------------------------------------------

CONTENT = "".join(f"line {i} of a play\n" for i in range(3000)).encode()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; cuts a reply after `cut_after` bytes; honours Range if `ranges`."""

    daemon_threads = True
    content = CONTENT
    cut_after: int | None = None
    ranges = True
    asked: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/input.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        asked = self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        end = len(server.content) if server.cut_after is None else start + server.cut_after
        self.wfile.write(server.content[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def shakespeare(monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path) -> Path:
    """A stand-in for tiny Shakespeare, as a file and at the server's address."""
    characters = "".join(sorted(set(CONTENT.decode()) | set(corpora.SHAKESPEARE_CHARACTERS)))
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(corpora, "SHAKESPEARE_BYTES", len(CONTENT))
    monkeypatch.setattr(corpora, "SHAKESPEARE_CHARACTERS", characters)
    path = tmp_path / "copy.txt"
    path.write_bytes(CONTENT)
    return path


def test_a_download_happens_once(tmp_path: Path, server: Server, shakespeare: Path) -> None:
    data = tmp_path / "data"
    prepare("shakespeare", data)
    prepare("shakespeare", data)
    prepare("shakespeare_char", data)
    assert server.asked == [None]
    assert (data / "tinyshakespeare.txt").read_bytes() == CONTENT
    again = prepare("shakespeare", tmp_path / "other", source=shakespeare)
    assert tree_hashes(again.directory) == tree_hashes(data / "shakespeare")


def fetch(server: Server, target: Path) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    files.download(server.url, target, size=len(CONTENT), sha256=sha256, progress=lambda done: None)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_is_resumed_or_restarted(
    tmp_path: Path, server: Server, ranges: bool
) -> None:
    target = tmp_path / "t"
    server.cut_after = 10_000
    with pytest.raises(OSError, match=r"(?s)cut after 10,000|could not be downloaded"):
        fetch(server, target)
    assert not target.exists()
    server.cut_after = None
    server.ranges = ranges
    fetch(server, target)
    assert server.asked == [None, "bytes=10000-"]
    assert target.read_bytes() == CONTENT
    assert listing(tmp_path) == ["t"]


def test_a_wrong_beginning_is_thrown_away(tmp_path: Path, server: Server) -> None:
    (tmp_path / ".t.download").write_bytes(b"something else")
    fetch(server, tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == CONTENT
    (tmp_path / ".t.download").write_bytes(CONTENT + b"more")
    fetch(server, tmp_path / "t")
    assert listing(tmp_path) == ["t"]


def test_wrong_bytes_are_refused(tmp_path: Path, server: Server) -> None:
    server.content = CONTENT[::-1]
    with pytest.raises(OSError, match=r"sent a file with sha256 .*expected .*--source FILE"):
        fetch(server, tmp_path / "t")
    assert listing(tmp_path) == []


def test_no_server(tmp_path: Path, server: Server) -> None:
    with pytest.raises(OSError, match=r"could not be downloaded .* check the connection"):
        files.download("http://127.0.0.1:1/x", tmp_path / "t", size=9, sha256="", progress=print)
    assert listing(tmp_path) == []


# --- parquet corpora --------------------------------------------------------------------------


def documents(shard: int, count: int) -> list[str | None]:
    rng = np.random.default_rng(shard)
    words = np.array(["the", "<|endoftext|>", "naïve", "☃", "\n", "fox"])
    texts: list[str | None] = [
        " ".join(rng.choice(words, rng.integers(0, 30))) for _ in range(count)
    ]
    texts[3] = None
    texts[5] = ""
    return texts


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Three files in openwebtext's schema; a row group is no multiple of a batch."""
    folder = tmp_path / "parquet [x]"
    folder.mkdir()
    for shard, count in enumerate((1200, 7, 2100)):
        table = pyarrow.table({"text": documents(shard, count)})
        path = folder / f"train-{shard:05d}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    return folder


def expected_tokens(folder: Path, fraction: float) -> dict[str, list[int]]:
    tokenizer = GPT2Tokenizer()
    tokens: dict[str, list[int]] = {"train": [], "val": []}
    for path in sorted(folder.glob("*.parquet")):
        for text in pyarrow.parquet.read_table(path)["text"].to_pylist():
            if text is not None:
                digest = hashlib.sha256(text.encode()).hexdigest()
                split = "val" if int(digest[:16], 16) / 2**64 < fraction else "train"
                tokens[split] += [*tokenizer.encode(text), END]
    return tokens


def encode_in_this_process(
    job: streaming.Job, shards: streaming.Shards, work: Path, num_proc: int
) -> None:
    for index, address in enumerate(shards.addresses):
        if not streaming._read_state(work, index).finished:
            spec = job.tokenizer.spec()
            streaming._encode_shard(address, work, index, spec, job.val_fraction)


def test_processes_change_nothing(
    tmp_path: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepare("openwebtext", tmp_path / "2", source=parquet, val_fraction=0.1, num_proc=2)
    expected = expected_tokens(parquet, 0.1)
    assert found.tokens("train").tolist() == expected["train"]
    assert found.tokens("val").tolist() == expected["val"]
    assert listing(tmp_path / "2") == [
        "openwebtext",
        "openwebtext/meta.json",
        "openwebtext/train.bin",
        "openwebtext/val.bin",
    ]
    monkeypatch.setattr(streaming, "_encode_shards", encode_in_this_process)
    again = prepare("openwebtext", tmp_path / "1", source=parquet, val_fraction=0.1)
    assert tree_hashes(again.directory) == tree_hashes(found.directory)


def test_a_stop_at_any_write_changes_nothing(
    tmp_path: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops before and after every note of progress, and while joining; each time goes on."""
    monkeypatch.setattr(streaming, "_encode_shards", encode_in_this_process)

    def run(data: str) -> Manifest:
        return prepare("fineweb_edu", tmp_path / data, source=parquet, val_fraction=0.1)

    whole = tree_hashes(run("whole").directory)
    write_state, move = streaming._write_state, streaming.move_directory
    stops = 0

    class StopHereError(Exception):
        pass

    def stopping(*arguments: object) -> None:
        nonlocal stops
        stops += 1
        if stops % 3 == 1:
            raise StopHereError
        (move if len(arguments) == 2 else write_state)(*arguments)
        if stops % 3 == 2:
            raise StopHereError

    monkeypatch.setattr(streaming, "_write_state", stopping)
    monkeypatch.setattr(streaming, "move_directory", stopping)
    for _ in range(100):
        try:
            found = run("stopped")
            break
        except StopHereError:
            pass
    assert stops > 12
    assert tree_hashes(found.directory) == whole
    assert run("stopped") == found
    assert listing(tmp_path / "stopped")[0] == "fineweb_edu"


def documents_noted(work: Path) -> int:
    return sum(json.loads(path.read_text())["documents"] for path in work.glob("0*.json"))


def start_prepare(parquet: Path, data: Path) -> subprocess.Popen[str]:
    """The command in a process group of its own, returned once it has got some way."""
    command = [sys.executable, str(PREPARE), "openwebtext", "--source", str(parquet)]
    command += ["--data_dir", str(data), "--num_proc=2", "--val-fraction", "0.1"]
    work = streaming.work_directory(data / "openwebtext")
    before = documents_noted(work)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while documents_noted(work) == before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


@pytest.fixture
def long_parquet(tmp_path: Path) -> Path:
    folder = tmp_path / "long"
    folder.mkdir()
    for shard in range(2):
        text = [(text or "") * 10 for text in documents(shard, 10_000)]
        path = folder / f"train-{shard:05d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    return folder


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_killed_and_interrupted_commands_go_on(
    tmp_path: Path, long_parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    work = streaming.work_directory(data / "openwebtext")

    with start_prepare(long_parquet, data) as process:
        process.kill()
    time.sleep(0.3)
    sizes = [path.stat().st_size for path in sorted(work.iterdir())]
    time.sleep(0.3)
    assert sizes == [path.stat().st_size for path in sorted(work.iterdir())], "a worker lives on"
    assert not (data / "openwebtext").exists()

    with start_prepare(long_parquet, data) as process:
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130
    assert "interrupted" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not (data / "openwebtext").exists()

    with pytest.raises(DatasetError, match="holds the unfinished work of other inputs"):
        prepare("openwebtext", data, source=long_parquet, val_fraction=0.2)
    assert 0 < documents_noted(work) < 20_000
    monkeypatch.setattr(streaming, "_encode_shards", encode_in_this_process)
    found = prepare("openwebtext", data, source=long_parquet, val_fraction=0.1)
    whole = prepare("openwebtext", tmp_path / "whole", source=long_parquet, val_fraction=0.1)
    assert tree_hashes(found.directory) == tree_hashes(whole.directory)


def test_two_at_once_are_refused(tmp_path: Path, parquet: Path) -> None:
    pytest.importorskip("fcntl")
    work = streaming.work_directory(tmp_path / "openwebtext")
    work.mkdir()
    with streaming._only_one(work), pytest.raises(DatasetError, match="by another process"):
        prepare("openwebtext", tmp_path, source=parquet)


def test_parquet_without_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), path)
    with pytest.raises(DatasetError, match=r"no column 'text', its columns are \['content'\]"):
        prepare("openwebtext", tmp_path, source=path)
    path.write_bytes(b"no parquet")
    with pytest.raises(DatasetError, match="is not a parquet file"):
        prepare("openwebtext", tmp_path, source=path)
    assert listing(tmp_path) == ["x.parquet"]


def test_a_shard_damaged_inside_is_named(
    tmp_path: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_encode_shards", encode_in_this_process)
    path = parquet / "train-00002.parquet"
    data = bytearray(path.read_bytes())
    data[100:5000] = bytes(4900)
    path.write_bytes(data)
    with pytest.raises(
        DatasetError, match=r"train-00002.parquet could not be read .* same command"
    ):
        prepare("openwebtext", tmp_path, source=parquet)


def test_the_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=re.escape("pip install 'eqx-gpt[datasets]'")):
        prepare("openwebtext", tmp_path)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str]]:
    """Runs scripts/prepare.py in this process; gives its exit status and what it printed."""
    monkeypatch.setattr(sys, "path", ["scripts", *sys.path])
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [str(PREPARE), *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(PREPARE), run_name="__main__")
        printed = capsys.readouterr()
        return caught.value.code, printed.out + printed.err

    return run


def test_command_flags_in_every_spelling(
    tmp_path: Path, text_file: Path, command: Callable[..., tuple[object, str]]
) -> None:
    for name, flag in (("a", ["--val_fraction", "0.2"]), ("b", ["--val-fraction=0.2"])):
        code, printed = command(
            "text", "--files", str(text_file), "--name", name, *flag, "--overwrite=False"
        )
        assert code == 0
        assert f"data/{name}/train.bin" in printed
    splits = [Manifest.read(tmp_path / "data" / name).splits for name in ("a", "b")]
    assert splits[0] == splits[1]


MISTAKES: dict[str, tuple[str, str]] = {
    "shakespere": ("shakespere", r"'shakespere'; did you mean 'shakespeare'\? known: "),
    "no dataset": ("", "DATASET"),
    "misspelt flag": ("stdlib --dta_dir x", "--data_dir"),
    "foreign flag": ("stdlib --source x", "--source does not apply to stdlib, only to shakes"),
    "no files": ("text --name x", "text needs the files and a name"),
    "no name": ("text --files {a}", "text needs the files and a name"),
    "taken name": ("text --files {a} --name stdlib", "name of another dataset"),
    "path as name": ("text --files {a} --name ../x", "cannot name a directory"),
    "missing file": ("text --files nope --name x", "nope does not exist"),
    "empty file": ("text --files empty --name x", "no text in empty"),
    "empty folder": ("text --files folder --name x", "folder is an empty folder"),
    "not UTF-8": ("text --files latin1 --name x", r"latin1 is not UTF-8 \(byte 0xE9 at 1\)"),
    "too small": ("text --files tiny --name x --tokenizer char", "train split would have 1 tok"),
    "fraction": ("text --files {a} --name x --val_fraction 1", "must lie between 0 and 1"),
    "tokenizer": ("text --files {a} --name x --tokenizer bpe", "'bpe' is neither char, gpt2"),
    "bad json": ("text --files {a} --name x --tokenizer {a}", "not a Hugging Face tokenizer.js"),
    "processes": ("stdlib --num_proc 0", "must be at least 1"),
    "number": ("stdlib --num_proc two", "two"),
    "no source": ("shakespeare --source nope", "nope is not a file"),
    "no parquet": ("openwebtext --source folder", "holds no parquet file"),
    "char": ("openwebtext --tokenizer char", "does not apply to openwebtext"),
    "data_dir": ("stdlib --data_dir empty", "empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_command_answers_mistakes(
    tmp_path: Path, text_file: Path, command: Callable[..., tuple[object, str]], mistake: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin1").write_bytes("né".encode("latin-1"))
    (tmp_path / "tiny").write_text("ab")
    before = listing(tmp_path)
    arguments, message = MISTAKES[mistake]
    code, printed = command(*arguments.replace("{a}", str(text_file)).split())
    assert code == 2
    assert re.search(message, printed)
    assert "Traceback" not in printed
    assert [name for name in listing(tmp_path) if name != "data"] == before


def test_command_help_names_everything(command: Callable[..., tuple[object, str]]) -> None:
    code, printed = command("--help")
    assert code == 0
    for flag in ("data_dir", "name", "source", "files", "tokenizer", "val_fraction", "num_proc"):
        assert f"--{flag} " in printed
    assert all(name in printed for name in CORPORA)
