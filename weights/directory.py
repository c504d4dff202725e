"""Directories that are written whole or not at all, and that replace nothing of others."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weights.errors import WeightsError


def check_target(directory: str | Path, written_here: re.Pattern[str], what: str) -> Path:
    """Where a directory may be written. WeightsError if that would destroy more than files whose
    names fit `written_here`."""
    target = Path(directory).expanduser().resolve()
    if target.is_dir():
        foreign = [p.name for p in target.iterdir() if not written_here.fullmatch(p.name)]
        if foreign:
            raise WeightsError(
                f"{target} holds {foreign[0]!r}, which is no file of {what}, and is not "
                "replaced; give another directory or move that file away"
            )
    elif target.exists():
        raise WeightsError(f"{target} is a file; give a directory")
    return target


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into, which takes its place if all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex
    partial, old = (target.with_name(f".{target.name}.{kind}-{unique}") for kind in ("new", "old"))
    partial.mkdir()
    try:
        yield partial
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(partial, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Onto the disk, against a power cut. Windows can do it to no directory."""
    if os.name == "posix" or path.is_file():
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
