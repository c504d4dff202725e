"""What a run's `run.json` says of itself, judged alike by whoever reads it. No jax is imported.

Its parts `config`, `model`, `lora` and `data` are hashed under `sha256`: one that was edited is not
what the run was trained with, and where its arrays keep their shapes nothing else would tell.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

FORMAT_VERSION = 1
PARTS = ("config", "model", "lora", "data")


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def digests(record: Mapping[str, Any]) -> dict[str, str]:
    """What a record has under `sha256`."""
    return {part: digest(record[part]) for part in PARTS}


def conflict(record: Any, parts: Iterable[str] = PARTS) -> str | None:
    """What is wrong with a record of which these parts will be read; None if nothing is."""
    version = record.get("format_version") if isinstance(record, Mapping) else None
    if version != FORMAT_VERSION:
        return (
            f"format_version is {version!r}, expected {FORMAT_VERSION}; a newer one needs a newer "
            "version of this package"
        )
    recorded = record.get("sha256")
    if not isinstance(recorded, Mapping):  # written before there were any
        return None
    for part in parts:
        found, expected = digest(record.get(part)), recorded.get(part)
        if found != expected:
            return (
                f"{part!r} was edited: its sha256 is {found[:12]}..., the run recorded "
                f"{str(expected)[:12]}...; put it back as it was, and give other settings as flags"
            )
    return None
