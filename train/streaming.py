"""Corpora of parquet files, on the hub or local, tokenized by many processes that may be killed.

A parquet file is a shard, tokenized by one process into a part of its own. After each batch of
documents the process first makes its tokens durable and then, atomically, notes how far it is;
so a run that was killed, at any moment, cuts each part back to what was noted and goes on. Parts
are joined in the order of the shards: neither the number of processes nor an interruption
changes a byte of the result.
"""

import atexit
import fnmatch
import glob
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from eqx_gpt.tokenizer import Tokenizer, fingerprint, tokenizer_from_spec
from train.corpora import held_out
from train.files import move_directory, sha256_of, write_atomically
from train.manifest import SPLITS, DatasetError, DatasetWriter, dtype_for
from train.progress import reporting

if TYPE_CHECKING:
    import pyarrow

BATCH_DOCUMENTS = 1000
JOIN_TOKENS = 2**23


@dataclass(frozen=True)
class WebCorpus:
    """A dataset of the Hugging Face hub with a column `text`.

    `places` are (revision, pattern of parquet files), tried in turn; a document is of the
    validation split where the sha256 of its text falls below `val_fraction`, so that equal
    documents are never in both. `documents` is their known number, for the ETA.
    """

    repository: str
    places: tuple[tuple[str, str], ...]
    documents: int
    val_fraction: float


WEB_CORPORA: dict[str, WebCorpus] = {
    "openwebtext": WebCorpus(
        repository="Skylion007/openwebtext",
        places=(
            ("main", "plain_text/train-*.parquet"),
            ("refs/convert/parquet", "plain_text/train/*.parquet"),
        ),
        documents=8_013_769,
        val_fraction=0.0005,
    ),
    "fineweb_edu": WebCorpus(
        repository="HuggingFaceFW/fineweb-edu",
        places=(("main", "sample/10BT/*.parquet"),),
        documents=9_672_101,
        val_fraction=0.0005,
    ),
}


@dataclass(frozen=True)
class Shards:
    """Where the parquet files are: hub addresses pinned to a commit, or local paths."""

    revision: str | None
    addresses: tuple[str, ...]
    documents: int


@dataclass(frozen=True)
class Job:
    """What is to be made; everything a process that takes it up again needs."""

    name: str
    source: dict[str, Any]
    tokenizer: Tokenizer
    val_fraction: float
    find_shards: Callable[[], Shards]


@dataclass(frozen=True)
class PartState:
    """How far a part is: documents read from the shard, and what they gave to each split."""

    documents: int = 0
    finished: bool = False
    train_tokens: int = 0
    train_bytes: int = 0
    val_tokens: int = 0
    val_bytes: int = 0


def require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DatasetError(
            "the `datasets` library is not installed and this corpus is read with it; "
            "pip install 'eqx-gpt[datasets]'"
        ) from None


def hub_shards(corpus: WebCorpus) -> Shards:
    """Asks the hub for the parquet files. DatasetError if it cannot be reached or has none."""
    import huggingface_hub

    for revision, pattern in corpus.places:
        try:
            info = huggingface_hub.HfApi().dataset_info(corpus.repository, revision=revision)
        except huggingface_hub.errors.RevisionNotFoundError:
            continue
        except Exception as error:  # the client's errors share no base class
            raise DatasetError(
                f"{corpus.repository}: the hub did not answer ({type(error).__name__}: {error}); "
                "check the connection and run the same command again, or give local parquet files "
                "with --source PATH"
            ) from None
        names = [file.rfilename for file in info.siblings or ()]
        if chosen := sorted(fnmatch.filter(names, pattern)):
            root = f"hf://datasets/{corpus.repository}@{info.sha}"
            addresses = tuple(f"{root}/{name}" for name in chosen)
            return Shards(info.sha, addresses, corpus.documents)
    tried = ", ".join(f"{pattern} of {revision}" for revision, pattern in corpus.places)
    raise DatasetError(
        f"{corpus.repository} has no parquet files where expected ({tried}); download its parquet "
        "files and give them with --source PATH"
    )


def local_parquet(source: Path) -> tuple[list[tuple[str, str]], Shards]:
    """A parquet file or the ones in a folder: ((name, sha256), ...) and where they are."""
    import pyarrow
    import pyarrow.parquet

    paths = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not paths or not paths[0].is_file():
        raise DatasetError(
            f"--source {source} holds no parquet file; give a .parquet file or a folder of them"
        )
    documents = 0
    for path in paths:
        try:
            footer = pyarrow.parquet.read_metadata(path)
        except pyarrow.ArrowInvalid as error:
            raise DatasetError(f"{path} is not a parquet file ({error}); remove it") from None
        if "text" not in (columns := footer.schema.to_arrow_schema().names):
            raise DatasetError(f"{path} has no column 'text', its columns are {columns}; rename it")
        documents += footer.num_rows
    root = source if source.is_dir() else source.parent
    hashes = [(path.relative_to(root).as_posix(), sha256_of(path)) for path in paths]
    return hashes, Shards(None, tuple(str(path.resolve()) for path in paths), documents)


def work_directory(target: Path) -> Path:
    """Where the unfinished parts of the dataset `target` are kept between runs."""
    return target.with_name(f".{target.name}.partial")


def prepare_streamed(job: Job, target: Path, num_proc: int, *, overwrite: bool) -> None:
    """Makes the dataset `target`, going on where an earlier run of the same job stopped.

    The unfinished parts of another job are thrown away only if `overwrite`.
    """
    work = work_directory(target)
    work.mkdir(parents=True, exist_ok=True)
    with _only_one(work):
        shards = _take_up(job, work, overwrite)
        _encode_shards(job, shards, work, num_proc)
        _join(job, shards, work, target)
        shutil.rmtree(work)


def _take_up(job: Job, work: Path, overwrite: bool) -> Shards:
    """The shards of the run before, if it was of the same job; else a clean start."""
    note = work / "job.json"
    identity = {
        "source": job.source,
        "tokenizer_fingerprint": fingerprint(job.tokenizer),
        "val_fraction": job.val_fraction,
    }
    if note.is_file():
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["identity"] == identity:
            shards = Shards(**known["shards"] | {"addresses": tuple(known["shards"]["addresses"])})
            # A hub's shards stay those of the commit begun with; local ones may have been moved.
            return shards if shards.revision else job.find_shards()
        if not overwrite:
            raise DatasetError(
                f"{work} holds the unfinished work of other inputs; give those again to go on with "
                "it, or --overwrite True to throw it away"
            )
    for path in work.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        shards = job.find_shards()
    except DatasetError:
        shutil.rmtree(work)
        raise
    text = json.dumps({"identity": identity, "shards": asdict(shards)}, indent=2)
    write_atomically(note, text.encode("utf-8"))
    return shards


def _encode_shards(job: Job, shards: Shards, work: Path, num_proc: int) -> None:
    indices = range(len(shards.addresses))
    todo = [i for i in indices if not _read_state(work, i).finished]
    if not todo:
        return

    def documents_done() -> int:
        return sum(_read_state(work, i).documents for i in indices)

    with (
        _workers(min(num_proc, len(todo))) as pool,
        reporting(f"tokenizing {job.name}", shards.documents, "documents") as update,
    ):
        update(documents_done())
        with _ignored_by_children(signal.SIGINT):
            running: set[Future[None]] = {
                pool.submit(
                    _encode_shard,
                    shards.addresses[i], work, i, job.tokenizer.spec(), job.val_fraction,
                )
                for i in todo
            }  # fmt: skip
        while running:
            done, running = wait(running, timeout=1.0, return_when="FIRST_EXCEPTION")
            for future in done:
                try:
                    future.result()
                except BrokenProcessPool:
                    raise DatasetError(
                        "a process was killed from outside, perhaps for want of memory; run the "
                        "same command again to go on, with a smaller --num_proc"
                    ) from None
            update(documents_done())


def _encode_shard(
    address: str, work: Path, index: int, tokenizer_spec: dict[str, Any], val_fraction: float
) -> None:
    """Tokenizes one shard into its part, from where the part's state says. Runs in a worker."""
    tokenizer = tokenizer_from_spec(tokenizer_spec)
    dtype = _disk_dtype(tokenizer)
    end_ids = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    end = np.array(end_ids, np.uint32)
    state = _read_state(work, index)
    paths = {split: _part(work, index, split) for split in SPLITS}
    with paths["train"].open("ab") as train, paths["val"].open("ab") as val:
        train.truncate(state.train_tokens * dtype.itemsize)
        val.truncate(state.val_tokens * dtype.itemsize)
        counts = asdict(state)
        for documents, texts in _batches(address, state.documents):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                data = text.encode("utf-8")
                split = "val" if held_out(data, val_fraction) else "train"
                file = val if split == "val" else train
                file.write(np.append(ids, end).astype(dtype).tobytes())
                counts[f"{split}_tokens"] += len(ids) + len(end)
                counts[f"{split}_bytes"] += len(data)
            counts["documents"] += documents
            _make_durable(train, val)
            _write_state(work, index, PartState(**counts))
        _write_state(work, index, PartState(**counts | {"finished": True}))


def _batches(address: str, skip: int) -> Iterator[tuple[int, list[str]]]:
    """(documents read, the texts among them) of one parquet file, without its first documents."""
    import datasets
    import tqdm

    datasets.disable_progress_bars()
    # The lock it would make is a system semaphore, which a process ended at once leaves behind.
    tqdm.tqdm.set_lock(threading.RLock())
    try:
        # A local path is taken for a pattern, an address of the hub is one file.
        path = address if "://" in address else glob.escape(address)
        rows = datasets.IterableDataset.from_parquet([path], columns=["text"])
        tables = rows.skip(skip).with_format("arrow").iter(BATCH_DOCUMENTS)
        for table in cast("Iterator[pyarrow.Table]", tables):
            yield len(table), [text for text in table["text"].to_pylist() if text is not None]
    except Exception as error:  # of the hub's client, the file system or the parquet reader
        raise DatasetError(
            f"{address} could not be read ({type(error).__name__}: {error}); run the same command "
            "again to go on where it stopped"
        ) from None


def _join(job: Job, shards: Shards, work: Path, target: Path) -> None:
    """Puts the parts one after the other, and the finished dataset in its place."""
    made = work / "dataset"
    if made.exists():
        shutil.rmtree(made)
    made.mkdir()
    states = [_read_state(work, i) for i in range(len(shards.addresses))]
    total = sum(state.train_tokens + state.val_tokens for state in states)
    dtype = _disk_dtype(job.tokenizer)
    joined = 0
    with (
        DatasetWriter(made, job.tokenizer) as writer,
        reporting(f"joining the parts of {job.name}", total, "tokens") as update,
    ):
        for index, state in enumerate(states):
            for split in SPLITS:
                text_bytes = getattr(state, f"{split}_bytes")
                with _part(work, index, split).open("rb") as file:
                    while len(ids := np.fromfile(file, dtype, JOIN_TOKENS)):
                        writer.append(split, ids, text_bytes=text_bytes)
                        text_bytes = 0
                        joined += len(ids)
                        update(joined)
        source = job.source | ({"revision": shards.revision} if shards.revision else {})
        writer.finish(job.name, source)
    move_directory(made, target)


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, and at once if it fails or this process is killed.

    They wait for a pipe to close, whose other end this process alone holds: the system closes
    it however the process ends, so no orphan goes on writing under the next run.
    """
    context = multiprocessing.get_context("spawn")  # fork and the library's threads do not mix
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, partial(_start_worker, reader))
    try:
        yield pool
        pool.shutdown()
    finally:
        writer.close()
        pool.shutdown(cancel_futures=True)


def _start_worker(pipe: Any) -> None:
    def wait_and_exit() -> None:
        try:
            pipe.recv_bytes()  # nothing is ever sent: it ends when the other end is closed
        finally:
            os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
    # Taking the interpreter down right after a read can abort in the parquet reader's threads.
    atexit.register(os._exit, 0)


@contextmanager
def _ignored_by_children(number: signal.Signals) -> Iterator[None]:
    """Processes started inside ignore the signal; this one, which ends them, does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, previous)


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Refuses a second run on the same parts (where the system has file locks of this kind)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(
                f"{work} is in use: this dataset is being prepared by another process; wait for it"
            ) from None
        yield


def _make_durable(*files: Any) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def _part(work: Path, index: int, suffix: str) -> Path:
    return work / f"{index:05d}.{suffix}"


def _read_state(work: Path, index: int) -> PartState:
    try:
        return PartState(**json.loads(_part(work, index, "json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return PartState()


def _write_state(work: Path, index: int, state: PartState) -> None:
    write_atomically(_part(work, index, "json"), json.dumps(asdict(state)).encode("utf-8"))


def _disk_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(dtype_for(tokenizer.vocab_size)).newbyteorder("<")
