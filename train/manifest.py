"""What a prepared dataset is: `data/<name>/{train.bin,val.bin,meta.json}`, and its verification.

The token files are nanoGPT's: ids one after the other, little-endian, uint16 or, where the
vocabulary needs it, uint32. `meta.json` says what they hold, so that a file that was cut, changed
or made for another vocabulary is refused before it is trained on.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np

from eqx_gpt.tokenizer import Tokenizer, fingerprint, same_tokens, tokenizer_from_spec

FORMAT_VERSION = 1
HASH_LIMIT_BYTES = 256 * 2**20
"""Larger token files are verified by size alone, so that a run need not read them twice."""

CORPORA = ("shakespeare_char", "shakespeare", "openwebtext", "fineweb_edu", "stdlib", "text")
"""What `scripts/prepare.py` prepares; `text` is the user's own, under a name of theirs."""

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

TokenDType = Literal["uint16", "uint32"]


class DatasetError(ValueError):
    """A dataset that is missing, damaged or cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Split:
    """One token file: its length in tokens, the UTF-8 bytes of its text, the file's sha256.

    `bytes` counts the documents alone, not the separators between them.
    """

    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A prepared dataset, as its `meta.json` describes it."""

    name: str
    directory: Path
    dtype: TokenDType
    vocab_size: int
    tokenizer_spec: dict[str, Any]
    tokenizer_fingerprint: str
    splits: dict[str, Split]
    source: dict[str, Any]

    @staticmethod
    def read(directory: str | Path) -> "Manifest":
        """Reads and verifies a dataset directory. DatasetError if anything does not match."""
        directory = Path(directory)
        manifest = _parse(directory)
        for name, split in manifest.splits.items():
            _verify(manifest._path(name), split, manifest._itemsize, _remedy(directory))
        return manifest

    def tokens(self, split: SplitName) -> np.memmap:
        """The split's ids, read from disk as they are used."""
        return np.memmap(self._path(split), dtype=f"<u{self._itemsize}", mode="r")

    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_spec(self.tokenizer_spec)

    def to_dict(self) -> dict[str, Any]:
        """The content of `meta.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer_spec,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "source": self.source,
        }

    def _path(self, split: str) -> Path:
        return self.directory / f"{split}.bin"

    @property
    def _itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize


class DatasetWriter:
    """Writes a dataset into an existing directory, split by split or interleaved.

    Use as a context manager: it closes the files. Nothing there is a dataset until `finish`
    has written `meta.json`, so write beside the dataset's place and rename the directory.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self.directory = directory
        self.tokenizer = tokenizer
        self.dtype: TokenDType = dtype_for(tokenizer.vocab_size)
        self._files = {split: (directory / f"{split}.bin").open("wb") for split in SPLITS}
        self._hashes = {split: hashlib.sha256() for split in SPLITS}
        self._tokens = dict.fromkeys(SPLITS, 0)
        self._bytes = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def append(self, split: SplitName, ids: np.ndarray, *, text_bytes: int) -> None:
        """Adds ids that stand for `text_bytes` bytes of UTF-8."""
        data = ids.astype(f"<u{np.dtype(self.dtype).itemsize}").tobytes()
        self._files[split].write(data)
        self._hashes[split].update(data)
        self._tokens[split] += len(ids)
        self._bytes[split] += text_bytes

    def finish(self, name: str, source: Mapping[str, Any]) -> None:
        """Writes `meta.json`. DatasetError if a split has no token to predict another from."""
        for split in SPLITS:
            if self._tokens[split] < 2:
                raise DatasetError(
                    f"dataset {name!r}: the {split} split would have {self._tokens[split]} tokens, "
                    "at least 2 are needed; give more text, or another --val_fraction"
                )
            self._files[split].flush()
            os.fsync(self._files[split].fileno())
        manifest = Manifest(
            name=name,
            directory=self.directory,
            dtype=self.dtype,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_spec=self.tokenizer.spec(),
            tokenizer_fingerprint=fingerprint(self.tokenizer),
            splits={
                split: Split(
                    self._tokens[split], self._bytes[split], self._hashes[split].hexdigest()
                )
                for split in SPLITS
            },
            source=dict(source),
        )
        with (self.directory / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(manifest.to_dict(), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())


def check_same_tokenizer(data: Manifest, tokenizer: Tokenizer) -> None:
    """DatasetError if a model with this tokenizer would take the dataset's ids for other text."""
    if not same_tokens(data.tokenizer(), tokenizer):
        raise DatasetError(
            f"dataset {data.name!r} was made with another tokenizer ({data.vocab_size} tokens, "
            f"fingerprint {data.tokenizer_fingerprint[:12]}) than the model's "
            f"({tokenizer.vocab_size} tokens, fingerprint {fingerprint(tokenizer)[:12]}); prepare "
            "the dataset with the model's tokenizer"
        )


def dtype_for(vocab_size: int) -> TokenDType:
    """The smallest file format that holds every id of the vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _parse(directory: Path) -> Manifest:
    """The manifest, its fields checked; the token files not yet looked at."""
    path = directory / "meta.json"
    remedy = _remedy(directory)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        missing = path if directory.is_dir() else directory
        raise DatasetError(f"{missing} does not exist; {remedy}") from None
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}); {remedy}") from None
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format_version {version!r}, expected {FORMAT_VERSION}; {remedy}"
        )
    try:
        vocab_size = _field(meta, "vocab_size", int)
        dtype = dtype_for(vocab_size)
        if (found := _field(meta, "dtype", str)) != dtype:
            raise ValueError(f"dtype {found!r}, expected {dtype!r} for {vocab_size} ids")
        manifest = Manifest(
            name=_field(meta, "name", str),
            directory=directory,
            dtype=dtype,
            vocab_size=vocab_size,
            tokenizer_spec=_field(meta, "tokenizer", dict),
            tokenizer_fingerprint=_field(meta, "tokenizer_fingerprint", str),
            splits={
                name: Split(
                    tokens=_field(split, "tokens", int),
                    bytes=_field(split, "bytes", int),
                    sha256=_field(split, "sha256", str),
                )
                for name in SPLITS
                for split in [_field(_field(meta, "splits", dict), name, dict)]
            },
            source=_field(meta, "source", dict),
        )
        tokenizer = manifest.tokenizer()
        if (found := fingerprint(tokenizer)) != manifest.tokenizer_fingerprint:
            raise ValueError(
                f"the tokenizer's fingerprint is {found}, expected {manifest.tokenizer_fingerprint}"
            )
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(
                f"vocab_size {vocab_size}, expected {tokenizer.vocab_size}, the tokenizer's"
            )
    except ValueError as error:
        raise DatasetError(f"{path}: {error}; {remedy}") from None
    return manifest


def _field(meta: Mapping[str, Any], name: str, kind: type) -> Any:
    value = meta.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"field {name!r} is {value!r}, expected {kind.__name__}")
    return value


def _verify(path: Path, split: Split, itemsize: int, remedy: str) -> None:
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; {remedy}")
    size, expected = path.stat().st_size, split.tokens * itemsize
    if size != expected:
        raise DatasetError(
            f"{path} has {size:,} bytes, expected {expected:,} ({split.tokens:,} tokens of "
            f"{itemsize} bytes); {remedy}"
        )
    if size <= HASH_LIMIT_BYTES:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != split.sha256:
            raise DatasetError(f"{path} has sha256 {found}, expected {split.sha256}; {remedy}")


def _remedy(directory: Path) -> str:
    """The command that makes the dataset anew."""
    name = directory.name
    named = f"text --files FILES --name {name}" if name not in CORPORA[:-1] else name
    where = "" if directory.parent == Path("data") else f" --data_dir {directory.parent}"
    again = " --overwrite True" if directory.is_dir() else ""
    return f"prepare it: python scripts/prepare.py {named}{where}{again}"
