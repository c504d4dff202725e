"""Files that are whole or absent: atomic writes and renames, hashes, verified downloads."""

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 20
TIMEOUT_S = 60


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` survive a power cut. Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """`path` holds either what it held before or all of `data`, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextmanager
def temporary_directory_beside(target: Path) -> Iterator[Path]:
    """A hidden directory on the same disk as `target`, removed at the end whatever happened."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def move_directory(source: Path, target: Path) -> None:
    """Puts `source` in the place of `target`. The files in `source` must be fsynced."""
    sync_directory(source)
    with temporary_directory_beside(target) as discarded:
        if target.exists():
            os.replace(target, discarded / "old")
        os.replace(source, target)
        sync_directory(target.parent)


def download(
    url: str, target: Path, *, size: int, sha256: str, progress: Callable[[int], None]
) -> None:
    """Downloads `url` to `target`, in place only once its bytes have the expected sha256.

    A download that was cut goes on where it stopped (HTTP Range), or starts again if the server
    cannot. `progress` gets the number of bytes so far. OSError if the server cannot be reached,
    cuts the connection, or sends other bytes; what came is kept for next time only if it may
    still become the file.
    """
    partial = target.with_name(f".{target.name}.download")
    target.parent.mkdir(parents=True, exist_ok=True)
    have = partial.stat().st_size if partial.exists() else 0
    if have < size:
        _fetch(url, partial, have, size, progress)
    if have and sha256_of(partial) != sha256:  # what an earlier run left was no part of this file
        _fetch(url, partial, 0, size, progress)
    found = sha256_of(partial)
    if found != sha256:
        partial.unlink()
        raise OSError(
            f"{url} sent a file with sha256 {found}, expected {sha256}; try again, or download it "
            "elsewhere and give it with --source FILE"
        )
    os.replace(partial, target)
    sync_directory(target.parent)


def _fetch(url: str, partial: Path, have: int, size: int, progress: Callable[[int], None]) -> None:
    """Appends to `partial`, which holds `have` bytes, until it holds `size`."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            if response.status != 206:
                have = 0
            with partial.open("r+b" if have else "wb") as file:
                file.seek(have)
                while have < size and (chunk := response.read(min(CHUNK, size - have))):
                    file.write(chunk)
                    have += len(chunk)
                    progress(have)
                file.flush()
                os.fsync(file.fileno())
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(
            f"{url} could not be downloaded ({reason}); check the connection and run the same "
            "command again, or download it elsewhere and give it with --source FILE"
        ) from error
    if have < size:
        raise OSError(
            f"{url} was cut after {have:,} of {size:,} bytes; run the same command again to go on"
        )
