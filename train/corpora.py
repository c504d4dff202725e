"""Corpora of local text: tiny Shakespeare, the Python standard library, anyone's own files."""

import hashlib
import json
import os
import platform
import string
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eqx_gpt.tokenizer import (
    END_OF_TEXT,
    CharTokenizer,
    GPT2Tokenizer,
    JSONTokenizer,
    Tokenizer,
)
from train.files import download, sha256_of
from train.manifest import DatasetError, SplitName
from train.progress import reporting

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_CHARACTERS = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
SHAKESPEARE_VAL_FRACTION = 0.1

STDLIB_VAL_FRACTION = 0.02
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Document:
    """A text that goes whole into one split.

    `answers` are the parts of it that a model learns to say, as (first character, one after the
    last), sorted; None is all of it.
    """

    split: SplitName
    text: str
    answers: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Corpus:
    """Text on this machine, and how to tokenize it.

    `source` names the content and the rule of the split, by hash: two corpora with the same
    source and tokenizer give the same token files. `documents` reads them, one at a time. Of a
    `packed` corpus each document is trained on as if it were alone, and has `answers`.
    """

    source: dict[str, Any]
    tokenizer: Tokenizer
    separator: Literal["end_of_text", "none"]
    text_bytes: int
    documents: Callable[[], Iterator[Document]]
    packed: bool = False


def held_out(key: bytes, fraction: float) -> bool:
    """Whether a document is of the validation split: decided by its key alone, for ever."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < fraction * 2**64


def tiny_shakespeare(
    tokens: Literal["characters", "gpt2"], data_dir: Path, source: Path | None
) -> Corpus:
    """1.1 MB of plays. The last 10 % of the characters are the validation split, as in nanoGPT.

    Taken from `source`, or downloaded once and kept in `data_dir`; the same bytes either way,
    so that all but the text itself is known beforehand.
    """
    text = None if source is None else _shakespeare_copy(source)

    def documents() -> Iterator[Document]:
        yield from _cut(text or _shakespeare_download(data_dir), SHAKESPEARE_VAL_FRACTION)

    return Corpus(
        source={"sha256": SHAKESPEARE_SHA256, "val": "the last 10 % of the characters"},
        tokenizer=CharTokenizer(SHAKESPEARE_CHARACTERS)
        if tokens == "characters"
        else GPT2Tokenizer(),
        separator="none",
        text_bytes=SHAKESPEARE_BYTES,
        documents=documents,
    )


def stdlib() -> Corpus:
    """Source and documentation of the Python standard library that runs this process.

    About 12 MB, on every machine, no network; each version of Python has another. Tests and
    installed packages are left out. A hash of a file's path decides its split (2 % val).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise DatasetError(
            f"stdlib: {root} holds no .py file, this Python comes without its source; use a "
            "Python that has it, or prepare a text of your own: text --files FILES --name NAME"
        )
    names = [path.relative_to(root).as_posix() for path in paths]
    # Read once and kept: a file that changes between hash and use cannot give another dataset.
    contents = [path.read_bytes() for path in paths]
    hashes = [hashlib.sha256(content).hexdigest() for content in contents]

    def documents() -> Iterator[Document]:
        for name, content in zip(names, contents, strict=True):
            val = held_out(name.encode("utf-8"), STDLIB_VAL_FRACTION)
            yield Document("val" if val else "train", content.decode("utf-8", "replace"))

    return Corpus(
        source={
            "python": platform.python_version(),
            "files": len(paths),
            "sha256": _digest(zip(names, hashes, strict=True)),
            "val": f"sha256 of a file's path, {STDLIB_VAL_FRACTION:.0%} of the files",
        },
        tokenizer=GPT2Tokenizer(),
        separator="end_of_text",
        text_bytes=sum(map(len, contents)),
        documents=documents,
    )


def own_text(files: Sequence[Path], tokenizer: str | Tokenizer, val_fraction: float) -> Corpus:
    """UTF-8 text files, and folders of them, in the order given, folders in the order of names.

    The last `val_fraction` of every file's characters are the validation split. `tokenizer` is
    one, `char` (the characters of these files), `gpt2` or the path of a `tokenizer.json`. A file
    is read whole, so the largest must fit in memory a few times over.
    """
    found = _text_files(files)
    hashes, text_bytes, characters = [], 0, set[str]()
    for name, path in found:
        text = _read_text(path)
        data = text.encode("utf-8")
        hashes.append((name, hashlib.sha256(data).hexdigest()))
        text_bytes += len(data)
        if tokenizer == "char":
            characters.update(text)
    if not text_bytes:
        raise DatasetError(f"--files: no text in {_listed(files)}; give files that have some")

    def documents() -> Iterator[Document]:
        for _, path in found:
            yield from _cut(_read_text(path), val_fraction)

    return Corpus(
        source={
            "files": len(found),
            "sha256": _digest(hashes),
            "val": f"the last {val_fraction:g} of every file's characters",
        },
        tokenizer=(
            CharTokenizer.from_text("".join(characters))
            if tokenizer == "char"
            else named_tokenizer(tokenizer)
        ),
        separator="end_of_text",
        text_bytes=text_bytes,
        documents=documents,
    )


def named_tokenizer(name: str | Tokenizer) -> Tokenizer:
    """One given as it is, `gpt2`, or the path of a `tokenizer.json`."""
    if not isinstance(name, str):
        return name
    if name == "gpt2":
        return GPT2Tokenizer()
    path = Path(name)
    if not path.is_file():
        raise DatasetError(
            f"--tokenizer {name!r} is neither char, gpt2 nor a file; give one of them, or the path "
            "of a tokenizer.json"
        )
    try:
        text = path.read_text(encoding="utf-8")
        return JSONTokenizer(text, _end_of_text_token(path, text))
    except ValueError as error:
        raise DatasetError(f"--tokenizer {name}: {error}") from None


def _end_of_text_token(path: Path, tokenizer_json: str) -> str | None:
    """The token that `tokenizer_config.json` beside the file names, or GPT-2's if it is there."""
    config = path.with_name("tokenizer_config.json")
    token = None
    if config.is_file():
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token or (END_OF_TEXT if json.dumps(END_OF_TEXT) in tokenizer_json else None)


def _shakespeare_copy(source: Path) -> str:
    if not source.is_file():
        raise DatasetError(f"--source {source} is not a file; give a copy of {SHAKESPEARE_URL}")
    data = source.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise DatasetError(
            f"--source {source} has sha256 {found} ({len(data):,} bytes), expected "
            f"{SHAKESPEARE_SHA256} ({SHAKESPEARE_BYTES:,} bytes); give a copy of {SHAKESPEARE_URL},"
            " or prepare a text of your own: text --files FILE --name NAME"
        )
    return data.decode("utf-8")


def _shakespeare_download(data_dir: Path) -> str:
    path = data_dir / "tinyshakespeare.txt"
    if not (path.is_file() and sha256_of(path) == SHAKESPEARE_SHA256):
        with reporting(f"downloading {SHAKESPEARE_URL}", SHAKESPEARE_BYTES, "bytes") as update:
            download(
                SHAKESPEARE_URL,
                path,
                size=SHAKESPEARE_BYTES,
                sha256=SHAKESPEARE_SHA256,
                progress=update,
            )
    return path.read_bytes().decode("utf-8")


def _cut(text: str, val_fraction: float) -> Iterator[Document]:
    at = int(len(text) * (1 - val_fraction))
    parts: tuple[tuple[SplitName, str], ...] = (("train", text[:at]), ("val", text[at:]))
    yield from (Document(split, part) for split, part in parts if part)


def _python_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in STDLIB_SKIPPED]
        yield from (Path(directory, name) for name in names if name.endswith(".py"))


def _text_files(files: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, path) of each file once; a file of a folder is named by its path below the folder."""
    found: dict[Path, tuple[str, Path]] = {}
    for given in files:
        if given.is_dir():
            below = [
                (path.relative_to(given).as_posix(), path)
                for path in given.rglob("*")
                if path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(given).parts)
            ]
            if not below:
                raise DatasetError(f"--files {given} is an empty folder; give one with text files")
            entries = sorted(below)
        elif given.is_file():
            entries = [(given.name, given)]
        else:
            raise DatasetError(f"--files {given} does not exist; give text files or folders")
        for name, path in entries:
            found.setdefault(path.resolve(), (name, path))
    return list(found.values())


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02X} at {error.start}); "
            "convert it, or leave it out"
        ) from None


def _digest(names_and_hashes: Iterable[tuple[str, str]]) -> str:
    listing = "".join(f"{sha256}  {name}\n" for name, sha256 in names_and_hashes)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
