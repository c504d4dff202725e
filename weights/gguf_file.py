"""GGUF, the files of llama.cpp: their metadata and tensors, read without trusting a byte.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little
endian. The reader of the `gguf` library raises anything, or takes all memory, on a damaged file.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from weights.errors import WeightsError
from weights.tensors import StoredTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
STRING, ARRAY = 8, 9
SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
QUANTS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip


@dataclass(frozen=True)
class GGUFFile:
    """A file of llama.cpp, mapped into memory.

    - `metadata`: key -> number, bool, string or list of them. A float32 is the shortest decimal
      that rounds to it.
    - `tensors`: name -> tensor, its shape in numpy's order; quantised ones read as float32.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Reads the header; the numbers of a tensor only when asked for.

    WeightsError if the file is damaged, cut short, of an unknown version, or one of several.
    """
    try:
        with path.open("rb") as file:
            cursor = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        metadata, tensors = _read(cursor, path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise WeightsError(f"{path}: {error}; fetch or convert it again") from error
    if metadata.get("split.count", 1) != 1:
        raise WeightsError(
            f"{path}: one of {metadata['split.count']} files of a model; join them with llama.cpp: "
            "llama-gguf-split --merge FIRST-FILE WHOLE.gguf"
        )
    return GGUFFile(path, metadata, tensors)


class _Cursor:
    """A place in the header. ValueError where it would leave the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.left = data, 0, len(data)

    def skip(self, n_bytes: int) -> int:
        """Moves on, and gives the place before."""
        if n_bytes > self.left:
            raise ValueError("the file is damaged or cut short: it ends inside its header")
        start = self.at
        self.at, self.left = start + n_bytes, self.left - n_bytes
        return start

    def whole(self, form: str) -> int:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]

    def string(self) -> str:
        n_bytes = self.whole("<Q")
        start = self.skip(n_bytes)
        return self.data[start : start + n_bytes].decode("utf-8")

    def numbers(self, code: int, count: int) -> list[Any]:
        dtype = np.dtype(SCALARS[code])
        array = np.frombuffer(self.data, dtype, count, self.skip(count * dtype.itemsize))
        if dtype == np.float32:
            return [float(str(x)) for x in array]
        if dtype == np.bool_ and (array.view(np.uint8) > 1).any():
            raise ValueError("the file is damaged: a truth value is neither 0 nor 1")
        return array.tolist()

    def value(self) -> Any:
        code = self.whole("<I")
        if code == STRING:
            return self.string()
        if code != ARRAY:
            return self.numbers(self._scalar(code), 1)[0]
        code, count = self.whole("<I"), self.whole("<Q")
        if code != STRING:
            return self.numbers(self._scalar(code), count)
        return [self.string() for _ in range(count)]

    def _scalar(self, code: int) -> int:
        if code not in SCALARS:
            raise ValueError(f"the file is damaged: no values have type {code}")
        return code


def _read(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    start = cursor.skip(4)
    if cursor.data[start : start + 4] != MAGIC:
        raise ValueError("it is no GGUF file: it does not begin with GGUF")
    version = cursor.whole("<I")
    if version not in VERSIONS:
        kind = "big endian" if version >= 1 << 16 else f"of version {version}"
        raise ValueError(f"GGUF files that are {kind} are not read, only little endian 2 and 3")
    n_tensors, n_values = cursor.whole("<Q"), cursor.whole("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the file is damaged: it has {key!r:.80} twice")
        metadata[key] = cursor.value()
    described = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment not in {1 << i for i in range(21)}:
        raise ValueError(f"general.alignment is {alignment!r:.80}, expected a power of two")
    cursor.skip(-cursor.at % alignment if described else 0)
    tensors: dict[str, StoredTensor] = {}
    expected = 0
    for name, shape, kind, offset in described:
        if name in tensors:
            raise ValueError(f"the file is damaged: it has tensor {name!r:.80} twice")
        row_bytes = _row_bytes(name, shape, kind)
        n_bytes = row_bytes * math.prod(shape[:-1])
        if offset != expected:
            raise ValueError(f"the file is damaged: {name} is at {offset}, expected {expected}")
        if n_bytes > cursor.left - offset:
            raise ValueError(f"the file is cut short: it ends before {name}")
        tensors[name] = _tensor(cursor, cursor.at + offset, shape, kind, row_bytes, path)
        expected = -(-(offset + n_bytes) // alignment) * alignment
    return metadata, tensors


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    # Imported where used: `import weights` stays fast.
    from gguf import GGMLQuantizationType

    name, n_dims = cursor.string(), cursor.whole("<I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise ValueError(f"the file is damaged: {name!r:.80} has {n_dims} dimensions")
    shape = tuple(cursor.whole("<Q") for _ in range(n_dims))[::-1]
    try:
        kind = GGMLQuantizationType(cursor.whole("<I")).name
    except ValueError as error:
        raise ValueError(f"{name!r:.80}: {error}, unknown here") from error
    return name, shape, kind, cursor.whole("<Q")


def _row_bytes(name: str, shape: tuple[int, ...], kind: str) -> int:
    """Bytes of the numbers along the last axis."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if block > 1 and len(shape) == 1:
        raise ValueError(f"{name!r:.80} has one dimension and type {kind}, expected F32")
    if shape[-1] % block:
        raise ValueError(f"{name!r:.80} has rows of {shape[-1]}, no multiple of {kind}'s {block}")
    return shape[-1] // block * block_bytes


def _tensor(
    cursor: _Cursor, start: int, shape: tuple[int, ...], kind: str, row_bytes: int, path: Path
) -> StoredTensor:
    if kind in FLOATS:
        rows = np.frombuffer(cursor.data, FLOATS[kind], math.prod(shape), start).reshape(shape)
        return StoredTensor(shape, kind, path, rows)
    n_bytes = row_bytes * math.prod(shape[:-1])
    raw = np.frombuffer(cursor.data, np.uint8, n_bytes, start).reshape(*shape[:-1], row_bytes)
    return StoredTensor(shape, "F32" if kind in QUANTS else kind, path, QuantisedRows(raw, kind))


@dataclass(frozen=True)
class QuantisedRows:
    """`rows[part]` is float32, computed from the blocks `raw[part]` when asked for."""

    raw: np.ndarray
    kind: str

    def __getitem__(self, part: Any) -> np.ndarray:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[self.kind]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        raw = np.ascontiguousarray(self.raw[part])
        # The library works on 16 rows at a time, which is slow if they are short.
        n_blocks = math.gcd(raw.size // block_bytes, 64)
        with np.errstate(all="ignore"):  # of scales that are no numbers, in a damaged file
            numbers = dequantize(raw.reshape(-1, n_blocks * block_bytes), kind)
        return numbers.reshape(*raw.shape[:-1], raw.shape[-1] // block_bytes * block)


@dataclass(frozen=True)
class ArrangedRows:
    """`rows[part]` of a tensor whose row i is the file's row `order[i]`, plus `added`."""

    rows: Any
    order: np.ndarray | None = None
    added: float = 0.0

    def __getitem__(self, part: slice) -> np.ndarray:
        rows = self.rows[part if self.order is None else self.order[part]]
        return rows + rows.dtype.type(self.added) if self.added else rows
