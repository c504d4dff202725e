"""Worker processes, one a contender, as their parent sees them.

Two frameworks in one process would share threads and allocator; and only a process of its own
starts in the environment that its contender is to have.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from scripts.benchmarks.job import Contender, Job, to_json

SERVE = Path(__file__).with_name("serve.py")


class WorkerError(ValueError):
    """A contender that failed; the message has its reason."""


@dataclass(frozen=True)
class Round:
    """One timing: how long for how many tokens (or bytes), in how many repetitions of the work."""

    seconds: float
    amount: float
    repeats: int
    memory: int | None

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


class Worker:
    """A context manager: inside, the contender is warm and answers; after it, it is gone.

    Everything it starts is in a process group of its own, which Ctrl-C does not reach and which
    ends as a whole.
    """

    def __init__(self, contender: Contender, job: Job) -> None:
        self.name = contender.name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(SERVE), *(["--tuned"] if contender.tuned else [])],
            text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        try:
            self.facts = self._ask(to_json(contender, job))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def round(self) -> Round:
        """WorkerError if the contender fails."""
        return Round(**self._ask("round"))

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer, or its absence, says why
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name} died: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name} failed: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        how = f"exit code {code}"
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
            how += ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return "; ".join([how, *lines[-3:]])
