"""Training state on disk, through Orbax: atomic, asynchronous, checked, the last few kept.

Orbax is imported by what uses it: a new run need not wait for it before its first step.

A run's `checkpoints/<step>/` holds four items: `model` and `optimizer`, flat mappings from the
dotted names of `eqx_gpt.tree.named_arrays` to arrays, `progress`, JSON, and `checksums`, of the
arrays of the others. `best/<step>/` holds `model` and `checksums`. A run that averages its weights
has their average as a fifth item, `average`, and as the `model` of `best`. Of a run with frozen
parts these hold what learns, and `base/0/`, written once, the rest.

A step is written under another name and takes its own when it is whole. One that cannot be read all
the same, or not as it was written, is `Damaged`: `restore` takes the one before.
"""

import contextlib
import dataclasses
import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, PyTree

from eqx_gpt.checksum import checksums
from eqx_gpt.gpt import GPT
from eqx_gpt.tree import named_arrays, with_arrays
from eqx_gpt.unreadable import Unreadable, read
from train.files import write_atomically
from train.guard import Guard
from train.hosts import is_writer, told
from train.run import RunError, steps_on_disk
from train.saved import check_arrays
from train.step import TrainState

T = TypeVar("T")

_ARRAYS, _VALUES = ("model", "optimizer", "average"), ("progress", "checksums")
_PARTIAL = ".orbax-checkpoint-tmp"  # in Orbax's name of a step that is not whole


class Damaged(Exception):
    """A checkpoint that cannot be read, or not as it was written."""


class Checkpoints:
    """The checkpoints of one run directory. Close it, or the last one may not be complete.

    With `read_only` nothing on disk changes, whatever else trains there. `warn` is told, in one
    line, what a person should know.
    """

    def __init__(
        self,
        run: Path,
        keep: int = 2,
        *,
        read_only: bool = False,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._run, self._read_only, self._warn = run.resolve(), read_only, warn
        self._states = _Steps(self._run / "checkpoints", keep, read_only)
        self._best = _Steps(self._run / "best", 1, read_only)
        self._base = _Steps(self._run / "base", 1, read_only)

    def latest_step(self) -> int | None:
        return max(self._states.on_disk(), default=None)

    def clear(self) -> None:
        """Leave nothing here that would pass for this run's: of a run without checkpoints the best
        model, and the frozen weights with it, go to a directory of their own, from which one can
        sample. Not of step 0, and not one that a run killed in time would put there again."""
        if not is_writer():
            return
        kept = (self._base, self._best)  # the best goes last: a kill between loses nothing
        step = max(self._best.on_disk(), default=0)
        if step and not any(self._run.glob(f"before*/best/{step}")):
            aside, i = self._run / "before", 1
            while any((aside / steps.directory.name).exists() for steps in kept if steps.on_disk()):
                aside, i = self._run / f"before{i}", i + 1
            aside.mkdir(exist_ok=True)
            for name in ("run.json", "tokenizer_spec.json", "metrics.jsonl", "samples.jsonl"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(self._run / name, aside / name)
            for steps in kept:
                if steps.on_disk():
                    steps.sweep()
                    steps.directory.rename(aside / steps.directory.name)
            self._warn(
                f"no checkpoint to go on from, but the best model of step {step}, which is "
                f"now in {aside}"
            )
        for steps in kept:
            shutil.rmtree(steps.directory, ignore_errors=True)

    def save(self, state: TrainState, step: int, progress: Mapping[str, Any]) -> None:
        """Start writing the state after `step` steps; of one that is on disk, the progress alone.

        Raises what an earlier save, or the start of this one, has met; the next call starts anew.
        """
        self._base.wait()  # without which no checkpoint is whole
        if named_arrays(state.frozen) and not self._base.on_disk():  # it failed, or vanished
            self.save_base(state.frozen)
            self._base.wait()
        said = _sealed({**progress, "guard": state.guard.to_dict()})
        self._states.wait()
        self._best.wait()  # `progress` tells of it
        if step in self._states.on_disk():
            path = self._states.directory / str(step) / "progress" / "metadata"
            return write_atomically(path, json.dumps(said).encode()) if is_writer() else None
        self._states.save(step, _trees(state), {"progress": said})

    def save_base(self, frozen: GPT) -> None:
        """Start writing the parts that no step changes, in the dtypes that they came in."""
        self._base.save(0, {"model": frozen})

    def save_best(self, params: GPT, step: int) -> None:
        """Keep this model in place of the best one so far. Errors as `save`."""
        self._base.wait()
        self._best.wait()
        if step not in self._best.on_disk():
            self._best.save(step, {"model": params})

    def holds_best(self, step: int) -> bool:
        """Is the best model of that step on disk, or on its way?"""
        return step in self._best.on_disk() or self._best.writing

    def restore(self, skeleton: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest whole state and its progress; `skeleton` gives shapes and dtypes.

        A damaged one is set aside, under another name, and said aloud; in a run of several
        processes, one that is damaged to any of them. What the best directory holds of steps to be
        done again is removed. RunError if all are damaged.
        """
        damaged: dict[int, Damaged] = {}
        while steps := set(self._states.on_disk()) - damaged.keys():
            step = max(steps)
            try:
                found = self._restored(skeleton, step)
            except Damaged as error:
                if step in self._states.on_disk():  # or a run that goes on has removed it
                    damaged[step] = error
                continue
            for bad, error in damaged.items():
                aside = "" if self._read_only else f", now {self._states.set_aside(bad).name}"
                self._warn(f"CHECKPOINT {bad} IS DAMAGED{aside}, going on from {step}: {error}")
            self._best.forget_after(step)
            return found
        reasons = "; ".join(f"{step}: {error}" for step, error in damaged.items())
        raise RunError(
            f"every checkpoint in {str(self._states.directory)!r} is damaged ({reasons}); put a "
            "copy of one in its place, or start anew in another --out_dir"
        )

    def _restored(self, skeleton: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        item = self._states.directory / str(step) / "model"
        check_arrays(item, named_arrays(skeleton.params))
        saved = self._states.restore(step, _trees(skeleton), ("progress",))
        progress = saved["progress"]
        frozen = skeleton.frozen
        if named_arrays(frozen):
            try:
                frozen = with_arrays(frozen, self._base.restore(0, {"model": frozen})["model"])
            except Damaged as error:
                raise RunError(
                    f"the frozen weights in {str(self._base.directory)!r} are damaged ({error}), "
                    "and no other file has them; put a copy in their place, or start anew"
                ) from None
        # A checkpoint from before there was a guard has seen nothing.
        guard = Guard.init()
        if (seen := progress.pop("guard", None)) is not None:
            guard = Guard.from_dict(seen)
        state = TrainState(
            with_arrays(skeleton.params, saved["model"]),
            frozen,
            with_arrays(skeleton.opt_state, saved["optimizer"]),
            _as_sharded(jnp.asarray(step, jnp.int32), skeleton.step),
            _as_sharded(guard, skeleton.guard),
            None if skeleton.average is None else with_arrays(skeleton.average, saved["average"]),
        )
        return state, progress

    def failure(self) -> Exception | None:
        """What a save that ended in the background has met, once."""
        for steps in (self._states, self._best):
            try:
                steps.poll()
            except Exception as error:
                return error
        return None

    def wait(self) -> None:
        """Until everything begun is on disk. Raises what was met instead."""
        for steps in (self._base, self._states, self._best):
            steps.wait()

    def close(self) -> None:
        """What still fails here was said, or is said by who waits before."""
        for steps in (self._base, self._states, self._best):
            steps.drop()

    def abandon(self) -> None:
        """Before the end of a process that the others do not know of: closing waits for them."""
        for steps in (self._base, self._states, self._best):
            steps.abandon()


@dataclasses.dataclass
class _Steps:
    """A directory of checkpoints by step. After an error it is opened anew, without remnants."""

    directory: Path
    keep: int
    read_only: bool
    _writing: Future[None] | None = None
    _abandoned: Any = None

    @cached_property
    def _checkpointer(self) -> Any:
        import orbax.checkpoint as ocp

        self.directory.mkdir(parents=True, exist_ok=True)
        self.sweep()
        handlers: dict[str, Any] = {item: ocp.JsonCheckpointHandler() for item in _VALUES}
        for item in _ARRAYS:
            # Numbers hardly compress (by 7 %), and trying takes the steps' time on a CPU.
            handlers[item] = ocp.PyTreeCheckpointHandler(use_compression=False)
        # Directories that cannot be made are so known at once.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler(**handlers)
        return ocp.AsyncCheckpointer(handler, async_options=options)

    @property
    def writing(self) -> bool:
        return self._writing is not None

    def on_disk(self) -> list[int]:
        return steps_on_disk(self.directory)

    def save(
        self, step: int, trees: Mapping[str, PyTree], values: Mapping[str, Any] | None = None
    ) -> None:
        import orbax.checkpoint as ocp

        arrays = {item: _written(named_arrays(tree)) for item, tree in trees.items()}
        sums = {
            item: {name: [str(named[name].dtype), sum_] for name, sum_ in checksums(named).items()}
            for item, named in arrays.items()
        }
        values = {**(values or {}), "checksums": sums}
        try:
            items = {item: ocp.args.PyTreeSave(named) for item, named in arrays.items()}
            items |= {item: ocp.args.JsonSave(value) for item, value in values.items()}
            checkpointer = self._checkpointer
            self.directory.mkdir(parents=True, exist_ok=True)  # it may have vanished
            checkpointer.save(self.directory / str(step), args=ocp.args.Composite(**items))
            self._writing = Future()
            Thread(target=self._finish, args=(checkpointer, self._writing)).start()
        except Exception:
            self._failed()
            raise

    def restore(
        self, step: int, trees: Mapping[str, PyTree], values: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Damaged, and so in every process of the run, if anything but the shapes asked for and
        the bits saved comes out in one of them. OSError if they do not see the same steps."""
        import orbax.checkpoint as ocp

        directory = self.directory / str(step)

        def read_all() -> tuple[dict[str, Any], dict[str, Any]]:
            place = directory / "checksums"
            # Older checkpoints have none.
            sums = json.loads((place / "metadata").read_bytes()) if place.exists() else {}
            found = {x: _unsealed(x, (directory / x / "metadata").read_bytes()) for x in values}
            # Not by a checkpointer, where each process waits for the others to have read.
            handler = ocp.StandardCheckpointHandler()
            for item, tree in trees.items():
                args = _restoring(tree, sums.get(item, {}))
                found[item] = handler.restore(directory / item, args=args)  # pyright: ignore[reportArgumentType]
            return sums, found

        sums, found, damage = {}, {}, ""
        try:
            sums, found = read(read_all)
        except Unreadable as error:
            damage = str(error)
        _agree(step, damage)
        for item, tree in trees.items():
            if wrong := _changed(found[item], sums.get(item, {})):
                raise Damaged(f"{item}: {', '.join(wrong)} changed since they were saved")
            found[item] = {name: found[item][name].astype(leaf.dtype) for name, leaf in
                           named_arrays(tree).items()}  # fmt: skip
        return found

    def set_aside(self, step: int) -> Path:
        """Rename a damaged step, so that nobody takes it for one and nobody loses it."""
        self.drop()
        path, i = self.directory / f"{step}.damaged", 1
        while path.exists():
            path, i = self.directory / f"{step}.damaged{i}", i + 1
        return (self.directory / str(step)).rename(path) if is_writer() else path

    def forget_after(self, step: int) -> None:
        for later in self.on_disk():
            if later > step:
                self._remove(later)

    def _finish(self, checkpointer: Any, writing: Future[None]) -> None:
        """In a thread: once the newest is whole, the oldest go."""
        try:
            checkpointer.wait_until_finished()
            with contextlib.suppress(OSError):
                for step in sorted(self.on_disk())[: -self.keep]:
                    self._remove(step)
            writing.set_result(None)
        except BaseException as error:
            writing.set_exception(error)

    def poll(self) -> None:
        """Raises what was met by what was begun, if it has ended."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what was begun is on disk; raises what it met instead."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except Exception:
                self._failed()
                raise

    def abandon(self) -> None:
        """Leave it as it is, with what it is at."""
        self._writing, self._abandoned = None, vars(self).pop("_checkpointer", None)

    def _failed(self) -> None:
        return self.drop() if jax.process_count() == 1 else self.abandon()

    def drop(self) -> None:
        """Close, whatever it says, and remove what was half written."""
        writing, self._writing = self._writing, None
        checkpointer = vars(self).pop("_checkpointer", None)
        if checkpointer is None:
            return
        with contextlib.suppress(Exception):
            if writing is not None:
                writing.result()
            checkpointer.close()
        self.sweep()

    def sweep(self) -> None:
        if not self.read_only and is_writer():
            for partial in self.directory.glob(f"*{_PARTIAL}*"):
                shutil.rmtree(partial, ignore_errors=True)

    def _remove(self, step: int) -> None:
        """Renamed first: what a kill leaves is no checkpoint, and is swept up like others."""
        if not self.read_only and is_writer():
            path = self.directory / str(step)
            shutil.rmtree(path.rename(f"{path}{_PARTIAL}"), ignore_errors=True)


def _trees(state: TrainState) -> dict[str, PyTree]:
    """The items of a checkpoint that are arrays."""
    trees = {"model": state.params, "optimizer": state.opt_state}
    return trees if state.average is None else {**trees, "average": state.average}


def _as_sharded(tree: T, skeleton: T) -> T:
    """Where a step leaves them, or the next one would be compiled anew."""
    here = SingleDeviceSharding(jax.local_devices()[0])

    def placed(x: Array, like: Any) -> Array:
        return jax.device_put(x, like.sharding or here)

    return jax.tree.map(placed, tree, skeleton)


def _written(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays as they are to be written, while steps go on."""
    if jax.default_backend() != "cpu":
        return dict(arrays)
    # Orbax writes a CPU's arrays from where they lie, and the next step, which takes them over
    # (donation), would wait until they are written.
    return jax.block_until_ready(jax.tree.map(jnp.copy, dict(arrays)))


def _changed(arrays: Mapping[str, Array], sums: Mapping[str, Any]) -> list[str]:
    """Which arrays are not those that were saved."""
    found = checksums({name: x for name, x in arrays.items() if name in sums})
    return [name for name, value in found.items() if value != sums[name][1]]


def _restoring(skeleton: PyTree, sums: Mapping[str, Any]) -> Any:
    """The arrays of these shapes, in the dtypes that they were saved in, as the shapes are sharded
    or on this process's device,
    wherever they were saved."""
    import orbax.checkpoint as ocp

    here = SingleDeviceSharding(jax.local_devices()[0])
    return ocp.args.StandardRestore(
        {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                sums[name][0] if name in sums else leaf.dtype,
                sharding=leaf.sharding or here,
            )
            for name, leaf in named_arrays(skeleton).items()
        }
    )


def _sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "crc32": zlib.crc32(json.dumps(values, sort_keys=True).encode())}


def _unsealed(item: str, content: bytes) -> dict[str, Any]:
    values = json.loads(content)
    sealed = values.pop("crc32", None)
    if sealed is not None and _sealed(values)["crc32"] != sealed:
        raise ValueError(f"{item} changed since it was saved")
    return values


def _agree(step: int, damage: str) -> None:
    """Damaged, if to one of the run's processes, which all read this step, it is."""
    lines = [line.partition(" ")[::2] for line in told(f"{step} {damage}")]
    if len(found := {seen for seen, _ in lines}) > 1:
        raise OSError(
            f"the processes find different last checkpoints, {' and '.join(sorted(found))}: the "
            "run directory has to be on a file system that they share"
        )
    for i, (_, said) in enumerate(lines):
        if said:
            raise Damaged(said if len(lines) == 1 else f"process {i}: {said}")
