"""Two runs, compared: what each logged, and what each left on disk, bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

_COMPARED = ("train_loss", "val_loss", "eval_train_loss", "grad_norm", "lr", "skipped")
_SHOWN = 5


def differences(first: Path, second: Path) -> list[str]:
    """What two runs differ in, a line each, but for times; empty if they are the same run."""
    a, b = _logged(first), _logged(second)
    found = [f"{kind} of {i} is in one run only" for kind, i in sorted(a.keys() ^ b.keys())]
    for kind, i in sorted(a.keys() & b.keys()):
        for name in a[kind, i]:
            x, y = a[kind, i][name], b[kind, i].get(name)
            if x != y:
                found.append(f"{name} of {kind} {i}: {x!r} and {y!r}")
    (step_a, arrays_a), (step_b, arrays_b) = saved_arrays(first), saved_arrays(second)
    if step_a != step_b:
        found.append(f"the last checkpoint is of step {step_a} and of step {step_b}")
    found += [f"{name} is in one run only" for name in sorted(arrays_a.keys() ^ arrays_b.keys())]
    for name in sorted(arrays_a.keys() & arrays_b.keys()):
        x, y = arrays_a[name], arrays_b[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype) or x.tobytes() != y.tobytes():
            found.append(f"{name} differs")
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return found[:_SHOWN] + more


def _logged(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """By kind and step, what does not depend on the clock. ValueError if one is there twice."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        key = ("evaluation" if "val_loss" in record else "step", record["iter"])
        if key in found:
            raise ValueError(f"{run / 'metrics.jsonl'} has {key[0]} {key[1]} twice")
        found[key] = {name: record[name] for name in _COMPARED if name in record}
    return found


def saved_arrays(run: Path) -> tuple[int, dict[str, Shaped[np.ndarray, "..."]]]:
    """The step of the newest checkpoint, and its arrays, of model, average, optimizer."""
    import jax
    import orbax.checkpoint as ocp
    from jax.sharding import SingleDeviceSharding

    here = SingleDeviceSharding(jax.local_devices()[0])
    steps: list[Any] = [p for p in (run / "checkpoints").resolve().iterdir() if p.name.isdecimal()]
    step = max(steps, key=lambda path: int(path.name))
    found = {}
    for item in ("model", "optimizer", "average"):
        if not (step / item).exists():
            continue
        tree: Any = ocp.StandardCheckpointHandler().metadata(step / item).tree
        target = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in tree.items()
        }
        with ocp.StandardCheckpointer() as checkpointer:
            arrays: Any = checkpointer.restore(step / item, target)
        found |= {f"{item}.{name}": np.asarray(x) for name, x in arrays.items()}
    return int(step.name), found
