"""What made a run: the processes that trained it, in its run.json."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from train.files import write_atomically

_ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a step computes."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def process_record(*, steps_done: int, precision: str, products: str) -> dict[str, Any]:
    """This process: when, by which command and code, on what, in which dtype and by which
    library's products. Names no host."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(_ROOT):
        script = script.relative_to(_ROOT)
    device = jax.devices()[0]
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steps_done": steps_done,
        "command": shlex.join([script.as_posix(), *sys.argv[1:]]),
        "commit": code_commit(),
        "precision": precision,
        "products": products,
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "versions": versions(),
    }


def add_process(run: Path, record: dict[str, Any]) -> None:
    """Append it to the `processes` of run.json."""
    path = run / "run.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["processes"] = [*content.get("processes", []), record]
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def code_commit() -> str | None:
    """The git commit of this code, with `-dirty` where files differ from it; None where unknown."""
    if not (_ROOT / ".git").exists():  # installed, perhaps into somebody else's repository
        return None
    describe = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*describe, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
