"""The tensors of safetensors files: their headers at once, their numbers when asked for."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from weights.errors import raise_problems

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CHUNK_BYTES = 1 << 23
CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk; `dtype` in the words of safetensors."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    rows: Any
    """What `rows[start:stop]` reads from the file; of use only if `dtype` is in DTYPES."""

    def read_into(self, view: np.ndarray, box: tuple[slice, ...]) -> None:
        """Copies a part of the tensor, a slice for each axis, to `view`, in its dtype.

        Reads all the rows at once: the caller keeps them few (`row_blocks`).
        """
        rows, *others = box
        source = self.rows[rows][(slice(None), *others)]
        # Transposing writes whole cache lines this way. (numpy follows the order of the target.)
        along = view.strides[-1] == view.itemsize
        step = len(view) if along else CACHE_LINE // view.itemsize
        for start in range(0, len(view), step):
            view[start : start + step] = source[start : start + step].astype(view.dtype, copy=False)

    def equals(self, other: "StoredTensor") -> bool:
        same = self.shape == other.shape
        return same and all(
            np.array_equal(self.rows[block], other.rows[block])
            for block in row_blocks(0, self.shape)
        )


def row_blocks(first: int, shape: Sequence[int]) -> list[slice]:
    """The rows of a part of this shape that begins at row `first`, in blocks of CHUNK_BYTES."""
    n_rows, *row_shape = shape
    step = max(1, CHUNK_BYTES // max(1, 4 * int(np.prod(row_shape))))
    stop = first + n_rows
    return [slice(start, min(start + step, stop)) for start in range(first, stop, step)]


def open_tensors(paths: Sequence[Path], index: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Every tensor of the files, by its key.

    WeightsError, with all the problems, if a file is damaged, if two files hold the same key, or
    if `index` (key -> file name) places a key where it is not.
    """
    # Imported where used: `import weights` stays fast.
    from safetensors import SafetensorError

    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for path in paths:
        try:
            found = _open(path)
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{path.name} is damaged or cut short ({error}); fetch it again")
            continue
        for key in sorted(tensors.keys() & found.keys()):
            problems.append(f"{key} is in {tensors[key].file.name} and {path.name}")
        tensors |= found
    if not problems:
        for key, name in index.items():
            if key not in tensors or tensors[key].file.name != name:
                problems.append(f"the index places {key} in {name}, which lacks it")
    if problems:
        raise_problems(str(paths[0].parent), problems)
    return tensors


def _open(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, mapped into memory.

    The library checks the header; it does not say where the numbers lie.
    """
    from safetensors import safe_open

    with safe_open(path, framework="np"):
        data = np.asarray(np.memmap(path, np.uint8, "r"))
    n_header = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + n_header].tobytes(), object_pairs_hook=_no_duplicates)
    data = data[8 + n_header :]
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        rows = data[slice(*entry["data_offsets"])]
        if dtype in DTYPES and rows.size:
            rows = rows.view(jnp.dtype(DTYPES[dtype])).reshape(shape)
        tensors[key] = StoredTensor(shape, dtype, path, rows)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header holds {twice:.80} twice")
    return values


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised array that jax on a CPU takes over without a copy."""
    n_bytes, alignment = int(np.prod(shape)) * np.dtype(dtype).itemsize, 64
    memory = np.empty(n_bytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + n_bytes].view(dtype).reshape(shape)
