"""Preparing datasets: a corpus becomes `data/<name>/{train.bin,val.bin,meta.json}`."""

import difflib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eqx_gpt.tokenizer import JSONTokenizer, Tokenizer, fingerprint
from train.corpora import Corpus, Document, named_tokenizer, own_text, stdlib, tiny_shakespeare
from train.files import move_directory, temporary_directory_beside
from train.manifest import CORPORA, DatasetError, DatasetWriter, Manifest
from train.messages import conversations, tokenize
from train.progress import reporting
from train.streaming import (
    WEB_CORPORA,
    Job,
    hub_shards,
    local_parquet,
    prepare_streamed,
    require_datasets,
    work_directory,
)

OPTIONS: dict[str, frozenset[str]] = {
    "shakespeare_char": frozenset({"source"}),
    "shakespeare": frozenset({"source"}),
    "openwebtext": frozenset({"source", "tokenizer", "val_fraction"}),
    "fineweb_edu": frozenset({"source", "tokenizer", "val_fraction"}),
    "stdlib": frozenset(),
    "text": frozenset({"files", "tokenizer", "val_fraction"}),
    "messages": frozenset({"files", "tokenizer", "val_fraction"}),
}
"""What each corpus lets its user choose."""

OWN_VAL_FRACTION = 0.1
BATCH_CHARACTERS = 2**21


def is_prepared(directory: str | Path) -> bool:
    """Whether there is a dataset. `Manifest.read` tells whether it is sound."""
    return (Path(directory) / "meta.json").is_file()


def prepare(
    corpus: str,
    data_dir: str | Path = "data",
    *,
    name: str | None = None,
    source: str | Path | None = None,
    files: Sequence[str | Path] = (),
    tokenizer: str | Tokenizer | None = None,
    val_fraction: float | None = None,
    num_proc: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Makes the dataset `data_dir/name` of `corpus` and returns its manifest.

    Where it is already there, of the same inputs and sound, nothing is done; of other inputs, or
    damaged, it is replaced only if `overwrite`. Whatever interrupts this, the directory is either
    absent, as it was, or whole. `num_proc` None takes every CPU. Reports to stderr. DatasetError
    for a mistake in the arguments, OSError for disk and network.
    """
    given = {
        "source": source,
        "files": tuple(files),
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
    }
    _check_arguments(corpus, name, given, num_proc)
    data_dir, name = Path(data_dir), name or corpus
    target = data_dir / name
    source = None if source is None else Path(source)
    processes = num_proc or os.cpu_count() or 1

    if corpus in WEB_CORPORA:
        job = _web_job(corpus, name, source, tokenizer or "gpt2", val_fraction)
        if ready := _ready(target, job.source, job.tokenizer, overwrite):
            return ready
        prepare_streamed(job, target, processes, overwrite=overwrite)
    else:
        local = _local_corpus(corpus, data_dir, source, files, tokenizer, val_fraction)
        identity = {"corpus": corpus} | local.source
        if ready := _ready(target, identity, local.tokenizer, overwrite):
            return ready
        _prepare_local(local, name, identity, target, processes)
    return Manifest.read(target)


def _local_corpus(
    corpus: str,
    data_dir: Path,
    source: Path | None,
    files: Sequence[str | Path],
    tokenizer: str | Tokenizer | None,
    val_fraction: float | None,
) -> Corpus:
    match corpus:
        case "shakespeare_char":
            return tiny_shakespeare("characters", data_dir, source)
        case "shakespeare":
            return tiny_shakespeare("gpt2", data_dir, source)
        case "stdlib":
            return stdlib()
        case _:
            fraction = OWN_VAL_FRACTION if val_fraction is None else val_fraction
            paths = [Path(file) for file in files]
            if corpus == "text":
                return own_text(paths, tokenizer or "gpt2", fraction)
            assert tokenizer is not None
            return conversations(paths, named_tokenizer(tokenizer), fraction)


def _web_job(
    corpus: str,
    name: str,
    source: Path | None,
    tokenizer: str | Tokenizer,
    val_fraction: float | None,
) -> Job:
    require_datasets()
    web = WEB_CORPORA[corpus]
    fraction = web.val_fraction if val_fraction is None else val_fraction
    identity: dict[str, Any] = {
        "corpus": corpus,
        "val": f"sha256 of a document's text, {fraction:g} of the documents",
    }
    if source is None:
        identity["repository"] = web.repository
        shards = None
    else:
        hashes, shards = local_parquet(source)
        identity["files"] = [{"name": name, "sha256": sha256} for name, sha256 in hashes]
    return Job(
        name=name,
        source=identity,
        tokenizer=named_tokenizer(tokenizer),
        val_fraction=fraction,
        find_shards=lambda: hub_shards(web) if shards is None else shards,
    )


def _prepare_local(
    corpus: Corpus, name: str, identity: dict[str, Any], target: Path, threads: int
) -> None:
    has_end = corpus.separator == "end_of_text" and corpus.tokenizer.end_of_text is not None
    end = np.array([corpus.tokenizer.end_of_text] if has_end else [], np.uint32)
    done = 0
    with temporary_directory_beside(target) as directory:
        with (
            DatasetWriter(directory, corpus.tokenizer, flagged=corpus.packed) as writer,
            reporting(f"tokenizing {name}", corpus.text_bytes, "bytes") as update,
        ):
            for batch in _batches(corpus.documents()):
                for document, ids, learnt in _encoded(corpus, batch, threads):
                    text_bytes = len(document.text.encode("utf-8"))
                    ids = np.append(ids, end)
                    writer.append(document.split, ids, text_bytes=text_bytes, learnt=learnt)
                    done += text_bytes
                update(min(done, corpus.text_bytes))
            writer.finish(name, identity)
        move_directory(directory, target)


def _encoded(
    corpus: Corpus, batch: list[Document], threads: int
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """Each document with its ids and, of a packed corpus, which of them are learnt."""
    tokenizer = corpus.tokenizer
    if corpus.packed:
        assert isinstance(tokenizer, JSONTokenizer)  # no other has a chat template
        with ThreadPoolExecutor(threads) as pool:
            results = pool.map(partial(tokenize, tokenizer), batch)
            for document, (ids, learnt) in zip(batch, results, strict=True):
                yield document, ids, learnt
        return
    encoded = tokenizer.encode_batch([document.text for document in batch], threads=threads)
    for document, ids in zip(batch, encoded, strict=True):
        yield document, ids, None


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Enough documents at a time to keep every thread busy, and no more than memory holds."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _ready(
    target: Path, source: dict[str, Any], tokenizer: Tokenizer, overwrite: bool
) -> Manifest | None:
    """The dataset that is there, if it is the one asked for. DatasetError if it is another."""
    if not target.exists():
        return None
    try:
        found = Manifest.read(target)
    except DatasetError:
        if overwrite:
            return None
        raise
    same_source = source.items() <= found.source.items()
    if same_source and found.tokenizer_fingerprint == fingerprint(tokenizer):
        print(f"{target} is ready: made of the same inputs before", file=sys.stderr)
        shutil.rmtree(work_directory(target), ignore_errors=True)
        return found
    if not overwrite:
        raise DatasetError(
            f"{target} exists and was made of other inputs; replace it with --overwrite True, or "
            "choose another --name or --data_dir"
        )
    return None


def _check_arguments(
    corpus: str, name: str | None, given: dict[str, Any], num_proc: int | None
) -> None:
    if corpus not in CORPORA:
        near = difflib.get_close_matches(corpus, CORPORA, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DatasetError(
            f"unknown dataset {corpus!r}; {hint}known: {', '.join(CORPORA)} (your own files: "
            "text --files FILES --name NAME, or messages for conversations)"
        )
    for option, value in given.items():
        if value not in (None, ()) and option not in OPTIONS[corpus]:
            takes = [name for name, options in OPTIONS.items() if option in options]
            raise DatasetError(
                f"--{option} does not apply to {corpus}, only to {', '.join(takes)}; leave it out"
            )
    if corpus == "text" and not (given["files"] and name):
        raise DatasetError(
            "text needs the files and a name for the dataset: text --files A.txt B/ --name mine"
        )
    if corpus == "messages" and not (given["files"] and name and given["tokenizer"]):
        raise DatasetError(
            "messages needs the files, a name for the dataset and the model whose tokenizer and "
            "chat template it is for: messages --files A.jsonl --name mine --tokenizer MODEL"
        )
    if name in CORPORA and name != corpus:
        raise DatasetError(f"--name {name} is the name of another dataset; choose one of your own")
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise DatasetError(
            f"--name {name!r} cannot name a directory; use letters, digits, '_', '-' and '.'"
        )
    if given["tokenizer"] == "char" and corpus in WEB_CORPORA:
        raise DatasetError(
            f"--tokenizer char does not apply to {corpus}, whose characters are not known before "
            "it is read; give gpt2 or the path of a tokenizer.json"
        )
    if given["tokenizer"] in ("char", "gpt2") and corpus == "messages":
        raise DatasetError(
            f"--tokenizer {given['tokenizer']} has no chat template; give a model tuned on "
            "conversations: of the zoo, a hub id, a directory or a .gguf file"
        )
    fraction = given["val_fraction"]
    if fraction is not None and not 0 < fraction < 1:
        raise DatasetError(f"--val_fraction {fraction} must lie between 0 and 1; try 0.1")
    if num_proc is not None and num_proc < 1:
        raise DatasetError(f"--num_proc {num_proc} must be at least 1; leave it out for every CPU")
