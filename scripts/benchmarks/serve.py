"""The process of one contender: prepares a job, then times a round whenever it is asked to.

It reads requests from stdin and answers on stdout, a line of JSON each. The first request is the
job; its answer, after everything is compiled and warm, tells the facts of the model. Then each
line asks for a round. Between two rounds the process sleeps in `readline`, so that the others
have the machine to themselves; it ends with its stdin, so that it never outlives its parent.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Prepared:
    """`run(n)` does the work n times and returns (seconds, tokens or bytes); it may leave out of
    both what is not to be counted. `facts` are about the model, for the table."""

    run: Callable[[int], tuple[float, float]]
    facts: dict[str, Any]


def timed(work: Callable[[], object], amount: float) -> tuple[float, float]:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, amount


def peak_memory(task: str) -> int | None:
    """The most memory this process ever had, in bytes: of the accelerator, if it computes on one.
    Of the host, where it loads files. None where the system does not say."""
    torch, jax = (None if task == "load" else sys.modules.get(name) for name in ("torch", "jax"))
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if torch is None and jax is not None and jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    # Libraries print what they like; answers have a pipe of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**answer: Any) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    from scripts.benchmarks.job import Job

    try:
        asked = json.loads(sys.stdin.readline())
        job = Job(**asked["job"])
        module = importlib.import_module(asked["module"])
        prepared: Prepared = module.prepare(job, asked["settings"])
        prepared.run(1)  # compiles
        start = time.perf_counter()
        prepared.run(1)
        once = time.perf_counter() - start
        repeats = min(MOST_REPEATS, max(1, round(job.round_seconds / once)))
        reply(**prepared.facts)
        while sys.stdin.readline():
            # Threads that wake up on one core need a while to part, and memory that lay idle may
            # have been taken back by the machine under a virtual one.
            prepared.run(max(1, repeats // 4))
            seconds, amount = prepared.run(repeats)
            reply(seconds=seconds, amount=amount, repeats=repeats, memory=peak_memory(job.task))
    except Exception as error:
        import traceback

        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        reply(error=f"{type(error).__name__} in {place}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)
    if "--tuned" in sys.argv:
        from scripts.environment import prepare_process

        prepare_process(__name__)
    main()
