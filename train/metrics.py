"""What a step costs in arithmetic, and where the numbers of a run go: metrics.jsonl."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from train.files import write_atomically


def flops_per_token(n_params: int, n_layer: int, n_embd: int, seq: int, n_frozen: int = 0) -> float:
    """Floating-point operations to train on one token: 6 N + 12 L d T, less 2 for each of the
    `n_frozen` parameters, which need no gradient.

    The convention of PaLM's appendix B (arXiv:2204.02311): forward and backward, the token
    embedding counted once, no discount for the causal half of attention.
    """
    return 6.0 * n_params - 2.0 * n_frozen + 12.0 * n_layer * n_embd * seq


class MetricsFile:
    """metrics.jsonl: one JSON object a line, flushed as it is written."""

    def __init__(self, path: Path, steps_done: int, evaluated_at: int | None) -> None:
        """Open to append after `steps_done` steps, the last evaluation after `evaluated_at`.

        What an interrupted run logged beyond its last checkpoint is dropped, for those steps
        will be done again: the file reads as if there had been no interruption.
        """
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if _belongs(line, steps_done, -1 if evaluated_at is None else evaluated_at):
                    kept.append(line)
        partial = path.with_suffix(".jsonl.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self._path, self._unwritten = path, b""
        self._file = path.open("a+b", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """OSError if it cannot be written; it is then, before the next one."""
        # JSON has no NaN.
        plain = {k: None if _is_nan(value) else value for k, value in record.items()}
        self._unwritten += (json.dumps(plain, allow_nan=False) + "\n").encode()
        size = self._file.seek(0, os.SEEK_END)
        n_written = 0
        try:
            n_written = self._file.write(self._unwritten)
        finally:
            if n_written < len(self._unwritten):
                self._file.truncate(size)  # half a line would spoil the next
        if n_written < len(self._unwritten):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unwritten = b""

    def rescue(self) -> None:
        """Write the file again, should its directory have been removed under the open file."""
        if not self._path.exists():
            self._file.seek(0)
            content = self._file.read()
            write_atomically(self._path, content)
            self._file.close()
            self._file = self._path.open("a+b", buffering=0)

    def close(self) -> None:
        self._file.close()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _belongs(line: str, steps_done: int, evaluated_at: int) -> bool:
    """Was this line logged by a step before `steps_done`, or an evaluation to `evaluated_at`?"""
    try:
        record = json.loads(line)
    except ValueError:  # cut off by a kill
        return False
    is_evaluation = "val_loss" in record
    known = record["iter"] <= evaluated_at if is_evaluation else record["iter"] < steps_done
    return line.endswith("\n") and known
