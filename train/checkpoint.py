"""Training state on disk, through Orbax: atomic, asynchronous, the last few kept.

Orbax is imported by what uses it: a new run need not wait for it before its first step.

A run's `checkpoints/<step>/` holds three items: `model` and `optimizer`, flat mappings from the
dotted names of `eqx_gpt.tree.named_arrays` to arrays, and `progress`, JSON. `best/<step>/` holds
`model` alone. Of a run with frozen parts these hold what learns, and `base/0/model`, written once,
the rest.
"""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from eqx_gpt.gpt import GPT
from eqx_gpt.tree import named_arrays, with_arrays
from train.run import has_checkpoint
from train.step import TrainState


class Checkpoints:
    """The checkpoints of one run directory. Close it, or the last one may not be complete."""

    def __init__(self, run: Path, keep: int = 2) -> None:
        self._run, self._keep = run.resolve(), keep  # Orbax wants absolute paths
        self._best: Any = None
        self._base: Any = None
        self._best_directory = self._run / "best"

    @cached_property
    def _states(self) -> Any:
        return _manager(self._run / "checkpoints", self._keep)

    def latest_step(self) -> int | None:
        return self._states.latest_step() if has_checkpoint(self._run) else None

    def clear(self) -> None:
        """Remove what a run that saved no step left here: it would pass for this one's."""
        for kept in ("best", "base"):
            shutil.rmtree(self._run / kept, ignore_errors=True)

    def save(self, state: TrainState, step: int, progress: dict[str, Any]) -> None:
        """Start writing the state after `step` steps, in place of one saved at that step."""
        import orbax.checkpoint as ocp

        self._wait_for_base()
        items = ocp.args.Composite(
            model=_saving(state.params),
            optimizer=_saving(state.opt_state),
            progress=ocp.args.JsonSave(progress),
        )
        _replace(self._states, step, items)

    def save_base(self, frozen: GPT) -> None:
        """Start writing the parts that no step changes, in the dtypes that they came in."""
        import orbax.checkpoint as ocp

        self._base = _manager(self._run / "base", keep=1)
        _replace(self._base, 0, ocp.args.Composite(model=_saving(frozen)))

    def save_best(self, params: GPT, step: int) -> None:
        """Keep this model in place of the best one so far."""
        import orbax.checkpoint as ocp

        self._wait_for_base()
        if self._best is None:
            self._best = _manager(self._best_directory, keep=1)
        _replace(self._best, step, ocp.args.Composite(model=_saving(params)))

    def restore(self, skeleton: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state and its progress; `skeleton` gives shapes and dtypes.

        What the best directory holds of steps to be done again is removed.
        """
        import orbax.checkpoint as ocp

        step = self.latest_step()
        if self._best_directory.exists():
            self._best = _manager(self._best_directory, keep=1)
            for later in [s for s in self._best.all_steps() if s > (step or 0)]:
                self._best.delete(later)
        items = ocp.args.Composite(
            model=_restoring(skeleton.params),
            optimizer=_restoring(skeleton.opt_state),
            progress=ocp.args.JsonRestore(),
        )
        saved, frozen = self._states.restore(step, args=items), skeleton.frozen
        if named_arrays(frozen):
            self._base = _manager(self._run / "base", keep=1)
            base = self._base.restore(0, args=ocp.args.Composite(model=_restoring(frozen)))
            frozen = with_arrays(frozen, base["model"])
        state = TrainState(
            with_arrays(skeleton.params, saved["model"]),
            frozen,
            with_arrays(skeleton.opt_state, saved["optimizer"]),
            jnp.asarray(step, jnp.int32),
        )
        return state, saved["progress"]

    def _wait_for_base(self) -> None:
        """Without which no checkpoint is whole."""
        if self._base is not None:
            self._base.wait_until_finished()

    def wait(self) -> None:
        """Until everything begun is on disk."""
        for manager in self._opened():
            manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        for manager in self._opened():
            manager.close()

    def _opened(self) -> list[Any]:
        states = vars(self).get("_states")
        return [m for m in (states, self._best, self._base) if m is not None]


def _replace(manager: Any, step: int, items: Any) -> None:
    manager.wait_until_finished()
    if step in manager.all_steps():
        manager.delete(step)
    manager.save(step, args=items, force=True)


def _saving(tree: PyTree) -> Any:
    import orbax.checkpoint as ocp

    return ocp.args.StandardSave(named_arrays(tree))


def _restoring(skeleton: PyTree) -> Any:
    """The arrays of these shapes and dtypes, as the shapes are sharded or on this process's device,
    wherever they were saved."""
    import orbax.checkpoint as ocp

    here = SingleDeviceSharding(jax.local_devices()[0])
    return ocp.args.StandardRestore(
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
            for name, leaf in named_arrays(skeleton).items()
        }
    )


def _manager(directory: Path, keep: int) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory, options=options)
