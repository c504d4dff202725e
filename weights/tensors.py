"""The tensors of safetensors files: their headers at once, their numbers when asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weights.errors import raise_problems

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk; `dtype` in the words of safetensors."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    rows: Any
    """What `rows[start:stop]` reads from the file."""

    def read_into(self, view: np.ndarray) -> None:
        """Copies the numbers to `view`, of the same shape, in its dtype and little memory."""
        for part in _chunks(self):
            view[part] = self.rows[part]

    def equals(self, other: "StoredTensor") -> bool:
        same = self.shape == other.shape
        return same and all(np.array_equal(self.rows[p], other.rows[p]) for p in _chunks(self))


def _chunks(tensor: StoredTensor) -> list[slice]:
    n_rows, *row_shape = tensor.shape
    step = max(1, CHUNK_BYTES // max(1, 4 * int(np.prod(row_shape))))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def open_tensors(paths: Sequence[Path], index: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Every tensor of the files, by its key.

    WeightsError, with all the problems, if a file is damaged, if two files hold the same key, or
    if `index` (key -> file name) places a key where it is not.
    """
    # Imported where used: `import weights` stays fast.
    import safetensors

    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for path in paths:
        try:
            file = safetensors.safe_open(path, framework="np")
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                rows = file.get_slice(key)
                if key in tensors:
                    problems.append(f"{key} is in {tensors[key].file.name} and {path.name}")
                tensors[key] = StoredTensor(tuple(rows.get_shape()), rows.get_dtype(), path, rows)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            problems.append(f"{path.name} is damaged or cut short ({error}); fetch it again")
    if not problems:
        for key, name in index.items():
            if key not in tensors or tensors[key].file.name != name:
                problems.append(f"the index places {key} in {name}, which lacks it")
    if problems:
        raise_problems(str(paths[0].parent), problems)
    return tensors


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised array that jax on a CPU takes over without a copy."""
    n_bytes, alignment = int(np.prod(shape)) * np.dtype(dtype).itemsize, 64
    memory = np.empty(n_bytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + n_bytes].view(dtype).reshape(shape)
