"""What a prepared dataset is: `data/<name>/{train.bin,val.bin,meta.json}`, and its verification.

The token files are nanoGPT's: ids one after the other, little-endian, uint16 or, where the
vocabulary needs it, uint32. `meta.json` says what they hold, so that a file that was cut, changed
or made for another vocabulary is refused before it is trained on.

Of conversations a byte a token beside them, `{train,val}.flags.bin`, says which tokens are learnt
(LEARNT) and where a document begins (BEGINS): such documents are not read on from one another.
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

FORMAT_VERSIONS = {False: 1, True: 2}
"""Without and with flags, which a reader that does not know them must not ignore."""

LEARNT, BEGINS = 1, 2
"""The bits of a token's flags."""

HASH_LIMIT_BYTES = 256 * 2**20
"""Larger token files are verified by size alone, so that a run need not read them twice."""

OWN = ("text", "messages")
CORPORA = ("shakespeare_char", "shakespeare", "openwebtext", "fineweb_edu", "stdlib", *OWN)
"""What `scripts/prepare.py` prepares; OWN are the user's, under a name of theirs."""

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

TokenDType = Literal["uint16", "uint32"]


class DatasetError(ValueError):
    """A dataset that is missing, damaged or cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Flags:
    """One file of flags: how many tokens are learnt, how many documents begin, its sha256."""

    learnt: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One token file: its length in tokens, the UTF-8 bytes of its text, the file's sha256.

    `bytes` counts the documents alone, not the separators between them. `flags` describes the
    file of flags, None if there is none.
    """

    tokens: int
    bytes: int
    sha256: str
    flags: Flags | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


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
        remedy = _remedy(directory, manifest.source)
        for name, split in manifest.splits.items():
            path = manifest._path(name)
            _verify(path, split.tokens, split.sha256, manifest._itemsize, remedy)
            if split.flags is not None:
                path = manifest._path(f"{name}.flags")
                _verify(path, split.tokens, split.flags.sha256, 1, remedy)
        return manifest

    def tokens(self, split: SplitName) -> np.memmap:
        """The split's ids, read from disk as they are used."""
        return np.memmap(self._path(split), dtype=f"<u{self._itemsize}", mode="r")

    def flags(self, split: SplitName) -> np.memmap | None:
        """The flags of the split's tokens, if it has any."""
        if self.splits[split].flags is None:
            return None
        return np.memmap(self._path(f"{split}.flags"), dtype=np.uint8, mode="r")

    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_spec(self.tokenizer_spec)

    def to_dict(self) -> dict[str, Any]:
        """The content of `meta.json`."""
        return {
            "format_version": FORMAT_VERSIONS[self._flagged],
            "name": self.name,
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer_spec,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "splits": {name: split.to_dict() for name, split in self.splits.items()},
            "source": self.source,
        }

    def _path(self, split: str) -> Path:
        return self.directory / f"{split}.bin"

    @property
    def _flagged(self) -> bool:
        return any(split.flags is not None for split in self.splits.values())

    @property
    def _itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize


class DatasetWriter:
    """Writes a dataset into an existing directory, split by split or interleaved.

    Use as a context manager: it closes the files. Nothing there is a dataset until `finish`
    has written `meta.json`, so write beside the dataset's place and rename the directory. With
    `flagged`, every document comes with flags.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, *, flagged: bool = False) -> None:
        self.directory = directory
        self.tokenizer = tokenizer
        self.dtype: TokenDType = dtype_for(tokenizer.vocab_size)
        self._flagged = flagged
        names = [*SPLITS, *(f"{split}.flags" for split in SPLITS if flagged)]
        self._files = {name: (directory / f"{name}.bin").open("wb") for name in names}
        self._hashes = {name: hashlib.sha256() for name in names}
        self._learnt = dict.fromkeys(SPLITS, 0)
        self._documents = dict.fromkeys(SPLITS, 0)
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

    def append(
        self,
        split: SplitName,
        ids: np.ndarray,
        *,
        text_bytes: int,
        learnt: np.ndarray | None = None,
    ) -> None:
        """Adds ids that stand for `text_bytes` bytes of UTF-8.

        In a flagged dataset they are one document; `learnt` says of each whether it is learnt.
        The first never is: nothing comes before it.
        """
        self._write(split, ids.astype(f"<u{np.dtype(self.dtype).itemsize}").tobytes())
        self._tokens[split] += len(ids)
        self._bytes[split] += text_bytes
        if self._flagged and len(ids):
            assert learnt is not None
            flags = np.where(learnt, LEARNT, 0).astype(np.uint8)
            flags[0] = BEGINS
            self._write(f"{split}.flags", flags.tobytes())
            self._learnt[split] += int(np.sum(flags == LEARNT))
            self._documents[split] += 1

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._hashes[name].update(data)

    def finish(self, name: str, source: Mapping[str, Any]) -> None:
        """Writes `meta.json`. DatasetError if a split has no token to predict another from."""
        for split in SPLITS:
            if self._tokens[split] < 2:
                raise DatasetError(
                    f"dataset {name!r}: the {split} split would have {self._tokens[split]} tokens, "
                    "at least 2 are needed; give more text, or another --val_fraction"
                )
            if self._flagged and not self._learnt[split]:
                raise DatasetError(
                    f"dataset {name!r}: the {split} split would have no token to learn, only "
                    "prompts; give more conversations with answers, or another --val_fraction"
                )
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        manifest = Manifest(
            name=name,
            directory=self.directory,
            dtype=self.dtype,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_spec=self.tokenizer.spec(),
            tokenizer_fingerprint=fingerprint(self.tokenizer),
            splits={
                split: Split(
                    self._tokens[split],
                    self._bytes[split],
                    self._hashes[split].hexdigest(),
                    self._flags(split),
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

    def _flags(self, split: SplitName) -> Flags | None:
        if not self._flagged:
            return None
        sha256 = self._hashes[f"{split}.flags"].hexdigest()
        return Flags(self._learnt[split], self._documents[split], sha256)


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
    if version not in FORMAT_VERSIONS.values():
        expected = " or ".join(map(str, FORMAT_VERSIONS.values()))
        raise DatasetError(f"{path} has format_version {version!r}, expected {expected}; {remedy}")
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
                    flags=_flags(split) if version == FORMAT_VERSIONS[True] else None,
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


def _flags(split: Mapping[str, Any]) -> Flags:
    flags = _field(split, "flags", dict)
    return Flags(
        learnt=_field(flags, "learnt", int),
        documents=_field(flags, "documents", int),
        sha256=_field(flags, "sha256", str),
    )


def _field(meta: Mapping[str, Any], name: str, kind: type) -> Any:
    value = meta.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"field {name!r} is {value!r}, expected {kind.__name__}")
    return value


def _verify(path: Path, tokens: int, sha256: str, itemsize: int, remedy: str) -> None:
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; {remedy}")
    size, expected = path.stat().st_size, tokens * itemsize
    if size != expected:
        raise DatasetError(
            f"{path} has {size:,} bytes, expected {expected:,} ({tokens:,} tokens of "
            f"{itemsize} bytes); {remedy}"
        )
    if size <= HASH_LIMIT_BYTES:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise DatasetError(f"{path} has sha256 {found}, expected {sha256}; {remedy}")


def _remedy(directory: Path, source: Mapping[str, Any] | None = None) -> str:
    """The command that makes the dataset anew; `source` is what its manifest says of it."""
    name = directory.name
    if name in CORPORA and name not in OWN:
        named = name
    elif source is not None and source.get("corpus") == "messages":
        named = f"messages --files FILES --name {name} --tokenizer MODEL"
    else:
        named = f"text --files FILES --name {name}"
    where = "" if directory.parent == Path("data") else f" --data_dir {directory.parent}"
    again = " --overwrite True" if directory.is_dir() else ""
    return f"prepare it: python scripts/prepare.py {named}{where}{again}"
