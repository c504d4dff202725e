"""Kills a run again and again, and asks whether it is still the run that nobody killed.

python scripts/benchmarks/kills.py --kills 200

A tiny run is started, killed (SIGKILL) at a random moment, and resumed, until it was killed so
often; then it is let to end, and compared with a run without interruption: every loss, and every
number of the model and of the optimizer, bit for bit. Kills aim in turn at steps, at checkpoints
being written, at evaluations, and at any time at all, the start included; what each one hit is
seen afterwards. One JSON line last on stdout; exit code 1 if anything differs or was lost.

The processes are forked from one that has imported everything and started no backend.
"""

import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

_PHASES = ("start", "steps", "checkpoint", "evaluation")
_EVERY = 4  # steps from checkpoint to checkpoint
_PARTIAL = ".orbax-checkpoint-tmp"


@dataclass
class Found:
    """What the kills hit, and what they broke."""

    n_kill: int = 0
    hit: Counter[str] = field(default_factory=Counter)  # a kill in an evaluation may hit two
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> int:
    from scripts.common import parse

    @dataclass(frozen=True)
    class Arguments:
        """Kills a run again and again, and compares it with one that was left alone."""

        kills: int = 200
        """How often."""
        seed: int = 0
        """Decides the moments, as far as the machine lets it."""

    options = parse(Arguments)
    with tempfile.TemporaryDirectory(prefix="eqx_gpt_kills_") as directory:
        found, differences = measure(
            Path(directory), options.kills, options.seed,
            lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    for line in (*found.lost, *differences):
        print(f"DIFFERS: {line}", file=sys.stderr)
    exact = not (found.lost or differences)
    result = {"kills": found.n_kill, **found.hit, "exact": exact}
    print(json.dumps({**result, "seconds": round(found.seconds, 1)}))
    return 0 if exact else 1


def measure(
    directory: Path, n_kill: int, seed: int, say: Callable[[str], None]
) -> tuple[Found, list[str]]:
    """Kill, resume and compare, all in `directory`. Start no backend before in this process.

    **Returns:** what was hit, and what differs in the end.
    """
    start = time.monotonic()
    _prepare(directory)
    n_step = 8 * n_kill + 40
    draw, found = random.Random(seed), Found()
    say(f"{n_step} steps without interruption")
    _wait(_forked(directory, "straight", n_step))
    for i in range(n_kill):
        before = _newest(directory / "killed")
        child = _forked(directory, "killed", n_step)
        aim = ("steps", "checkpoint", "evaluation", "any")[i % 4]
        alive = _kill(child, directory / "killed", aim, draw, before)
        if not alive:
            say(f"the run ended before kill {i + 1}")
            break
        found.hit.update(_hit(child, directory / "killed"))
        found.n_kill += 1
        after = _newest(directory / "killed")
        if after < before:
            found.lost.append(f"kill {i + 1} left step {after}, and {before} was on disk before")
        if i % 10 == 9:
            say(f"{i + 1} kills of {n_kill}, step {after} of {n_step}: {dict(found.hit)}")
    say("the rest without interruption, and the comparison")
    _wait(_forked(directory, "killed", n_step))
    differences = _compared(directory)
    found.seconds = time.monotonic() - start
    return found, differences


@dataclass
class _Child:
    pid: int
    shared: mmap.mmap  # [0]: what it does, an index of _PHASES; [1:5]: steps done since its start
    log: Path

    @property
    def phase(self) -> str:
        return _PHASES[self.shared[0]]

    @property
    def n_step(self) -> int:
        return int.from_bytes(self.shared[1:5], "little")


def _prepare(directory: Path) -> None:
    """A dataset, and everything imported that a child needs."""
    import jax
    import orbax.checkpoint  # noqa: F401

    import train.loop  # noqa: F401
    from train.datasets import prepare

    for name, value in (
        ("jax_compilation_cache_dir", str(directory / "programs")),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", 0),
    ):
        jax.config.update(name, value)
    draw = random.Random(0)
    words = ("Jack", "Jill", "hill", "pail", "water", "fell", "crown", "after")
    source = directory / "text.txt"
    source.write_text(" ".join(draw.choice(words) for _ in range(3000)))
    prepare("text", directory / "data", name="text", files=(source,), tokenizer="char")


def _forked(directory: Path, name: str, n_step: int) -> _Child:
    """A process that starts the run, or goes on with it."""
    shared, log = mmap.mmap(-1, 8), directory / f"{name}.log"
    pid = os.fork()
    if pid:
        return _Child(pid, shared, log)
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
        code = _train(directory, name, n_step, shared)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _train(directory: Path, name: str, n_step: int, shared: mmap.mmap) -> int:
    import train.loop
    from train.config import TrainConfig
    from train.manifest import Manifest
    from train.run import has_run

    def marked(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, shared[0] = shared[0], _PHASES.index(phase)
            try:
                return function(*args, **kwargs)
            finally:
                shared[0] = before

        return call

    def stepped(*args: Any) -> Any:
        shared[0] = _PHASES.index("steps")
        done = int.from_bytes(shared[1:5], "little") + 1
        shared[1:5] = done.to_bytes(4, "little")
        return train_step(*args)

    train_step = train.loop.train_step
    train.loop.train_step = stepped
    train.loop.sampled_loss = marked("evaluation", train.loop.sampled_loss)
    train.loop.peak_flops = lambda dtype: None  # not measured at every start
    train.loop.Checkpoints.save = marked("checkpoint", train.loop.Checkpoints.save)
    config = TrainConfig(
        out_dir=str(directory / name), data_dir=str(directory / "data"), dataset="text",
        n_layer=1, n_head=2, n_embd=14, block_size=13, batch_size=3, dropout=0.1,
        gradient_accumulation_steps=1, max_iters=n_step, lr_decay_iters=n_step, warmup_iters=3,
        learning_rate=0.01, eval_interval=3 * _EVERY, eval_iters=4, checkpoint_interval=_EVERY,
        checkpoint_minutes=0.0, always_save_checkpoint=False, precision="float32",
    )  # fmt: skip
    data = Manifest.read(directory / "data" / "text")
    return train.loop.train(config, data, resume=has_run(config.out_dir)).exit_code


def _kill(child: _Child, run: Path, aim: str, draw: random.Random, before: int) -> bool:
    """SIGKILL at a moment of that kind; False if the process ended before.

    Kills in steps and in evaluations wait for a checkpoint, so that the run comes to an end.
    """
    if aim == "any":
        until, reached = time.monotonic() + draw.uniform(0.0, 4.0), lambda: False
    else:
        n_step = draw.randrange(1, 2 * _EVERY)
        until = time.monotonic() + 60.0
        reached = {
            "steps": lambda: child.n_step >= n_step and _newest(run) > before,
            "checkpoint": lambda: child.n_step and _writing(run),
            "evaluation": lambda: child.phase == "evaluation" and _newest(run) > before,
        }[aim]
    while time.monotonic() < until and not reached():
        if os.waitpid(child.pid, os.WNOHANG)[0]:
            _check_log(child)
            return False
        time.sleep(0.0005)
    time.sleep(draw.uniform(0.0, 0.02 if aim == "checkpoint" else 0.004))
    os.kill(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    return os.WIFSIGNALED(status)


def _hit(child: _Child, run: Path) -> set[str]:
    """What a process was at when it was killed. Checkpoints are written in the background: what
    is half written tells."""
    return {child.phase, "checkpoint"} if _writing(run) else {child.phase}


def _writing(run: Path) -> bool:
    places = (run / "checkpoints", run / "best")
    return any(_PARTIAL in name for p in places if p.is_dir() for name in os.listdir(p))


def _newest(run: Path) -> int:
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _wait(child: _Child) -> None:
    _, status = os.waitpid(child.pid, 0)
    if status:
        raise RuntimeError(f"a run ended with status {status}: {child.log.read_text()[-1500:]}")


def _check_log(child: _Child) -> None:
    text = child.log.read_text()
    if "is saved in" not in text:
        raise RuntimeError(f"a run that was not killed ended: {text[-1500:]}")


def _compared(directory: Path) -> list[str]:
    """In a process of its own, for it starts a backend."""
    path, pid = directory / "differences.json", os.fork()
    if not pid:
        try:
            from train.compare import differences

            found = differences(directory / "straight", directory / "killed")
            path.write_text(json.dumps(found))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return json.loads(path.read_text()) if path.exists() else ["the comparison failed"]


if __name__ == "__main__":
    sys.exit(main())
