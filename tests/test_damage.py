"""Damaged and hostile files: each ends in a WeightsError or in the right model, and no other way.

The ordinary mistakes are in tests/test_weights.py; these only a broken disk or an enemy makes.
"""

import contextlib
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import hf_files
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from weights import WeightsError, from_pretrained

CONFIG = hf_files.GPT2_CONFIG
TENSORS = hf_files.gpt2_tensors(CONFIG, "transformer.")
MOST_BYTES = 2**24  # far above what so small a model needs, far below what hostile sizes ask for


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return hf_files.write_model(tmp_path / "hf", CONFIG, TENSORS)


@pytest.fixture
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def split(path: Path) -> tuple[bytes, bytes]:
    """The header of a safetensors file, and its data."""
    whole = path.read_bytes()
    (n_header,) = struct.unpack("<Q", whole[:8])
    return whole[8 : 8 + n_header], whole[8 + n_header :]


def write(path: Path, header: bytes, data: bytes, n_header: int | None = None) -> None:
    path.write_bytes(
        struct.pack("<Q", len(header) if n_header is None else n_header) + header + data
    )


def as_json(header: Any) -> bytes:
    return json.dumps(header).encode()


# The header of a safetensors file


def flip(header: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(header)
    for _ in range(draw.choice([1, 1, 2, 8])):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def splice(header: bytes, draw: random.Random) -> bytes:
    """A piece put elsewhere, over what is there or between."""
    start, to = draw.randrange(len(header)), draw.randrange(len(header))
    piece = header[start : start + draw.choice([1, 2, 10, 100])]
    return header[:to] + piece + header[to + draw.choice([0, len(piece)]) :]


def cut_out(header: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(header))
    return header[:start] + header[start + draw.choice([1, 2, 10, 100]) :]


def other_number(header: bytes, draw: random.Random) -> bytes:
    """A digit replaced by a number of another kind."""
    digits = [i for i, c in enumerate(header) if chr(c).isdigit()]
    at = draw.choice(digits)
    new = draw.choice([b"0", b"7", b"-1", b"1e3", b"0.5", b"9" * 25, b"null", b'"1"', b"[]"])
    return header[:at] + new + header[at + 1 :]


def test_500_damaged_headers(directory: Path) -> None:
    right = from_pretrained(directory)
    header, data = split(directory / "model.safetensors")
    draw = random.Random(0)
    refused = 0
    for i in range(500):
        damaged = (flip, splice, cut_out, other_number)[i % 4](header, draw)
        write(directory / "model.safetensors", damaged, data)
        before = contents(directory)
        try:
            model = from_pretrained(directory)
        except WeightsError:
            refused += 1
        else:
            assert eqx.tree_equal(model, right), damaged
        assert contents(directory) == before
    assert 400 < refused < 500


def entries(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def changed(header: bytes) -> bytes:
        values = json.loads(header)
        change(values)
        return as_json(values)

    return changed


def entry(**fields: Any) -> Callable[[bytes], bytes]:
    """The header with other fields of `transformer.ln_f.bias`, of shape (10,)."""
    return entries(lambda header: header["transformer.ln_f.bias"].update(fields))


def swap_offsets(header: dict[str, Any]) -> None:
    """Two tensors that share numbers, and numbers that belong to none."""
    bias, weight = header["transformer.ln_f.bias"], header["transformer.ln_f.weight"]
    bias["data_offsets"] = weight["data_offsets"]


def once_more(header: bytes) -> bytes:
    """Only the second of the two entries would be seen, and it is the right one."""
    values = json.loads(header)
    other = values["transformer.ln_f.weight"]
    return b'{"transformer.ln_f.bias": ' + as_json(other) + b", " + header.lstrip()[1:]


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda header: b"",
    "nothing in it": lambda header: b"{}",
    "not an object": lambda header: b"[1, 2]",
    "not UTF-8": lambda header: b"\xff\xfe" + header,
    "lone surrogate": lambda header: header.replace(b"ln_f", rb"ln_\ud800"),
    "deep": lambda header: b"[" * 100_000 + b"]" * 100_000,
    "deep in an entry": entry(shape=json.loads("[" * 500 + "]" * 500)),
    "deep metadata": entries(lambda h: h.update(__metadata__=json.loads("[" * 500 + "]" * 500))),
    "metadata of numbers": entries(lambda header: header.update(__metadata__={"format": 7})),
    "NaN": lambda header: header.replace(b"[10]", b"[NaN]", 1),
    "long number": lambda header: header.replace(b"[10]", b"[" + b"9" * 10_000 + b"]", 1),
    "key twice": once_more,
    "field twice": lambda header: header.replace(b'"shape"', b'"shape":[10],"shape"', 1),
    "entry is a list": entries(lambda header: header.update({"transformer.ln_f.bias": [1, 2]})),
    "entry is null": entries(lambda header: header.update({"transformer.ln_f.bias": None})),
    "shape is a string": entry(shape="10"),
    "shape is a number": entry(shape=10),
    "shape is null": entry(shape=None),
    "shape of strings": entry(shape=["10"]),
    "shape of floats": entry(shape=[10.0]),
    "negative shape": entry(shape=[-10]),
    "two negatives": entry(shape=[-2, -5]),
    "shape that overflows": entry(shape=[2**63, 2]),
    "shape that wraps around": entry(shape=[2**62 + 10, 2**2]),
    "hundred axes": entry(shape=[10] + [1] * 100),
    "unknown dtype": entry(dtype="F33"),
    "dtype is a number": entry(dtype=32),
    "wider dtype": entry(dtype="F64"),
    "one offset": entry(data_offsets=[0]),
    "three offsets": entry(data_offsets=[0, 40, 80]),
    "offsets are strings": entry(data_offsets=["0", "40"]),
    "offsets of floats": entry(data_offsets=[0.0, 40.0]),
    "negative offsets": entry(data_offsets=[-40, 0]),
    "backward offsets": entry(data_offsets=[40, 0]),
    "offsets that leave the file": entry(data_offsets=[10**9, 10**9 + 40]),
    "offsets that overflow": entry(data_offsets=[2**64 - 40, 2**64]),
    "offsets of another tensor": entries(swap_offsets),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_header(name: str, directory: Path, little_memory: None) -> None:
    path = directory / "model.safetensors"
    header, data = split(path)
    write(path, HEADERS[name](header), data)
    with pytest.raises(WeightsError):
        from_pretrained(directory)


@pytest.mark.parametrize("n_header", [0, 1, 10**8, 2**31, 2**32, 2**63 - 8, 2**63, 2**64 - 1])
def test_hostile_length_of_the_header(n_header: int, directory: Path, little_memory: None) -> None:
    path = directory / "model.safetensors"
    write(path, *split(path), n_header=n_header)
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        from_pretrained(directory)


def test_data_that_is_longer_than_the_header_says(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        from_pretrained(directory)
    os.truncate(path, 2**40)  # a sparse file
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        from_pretrained(directory)


def test_numbers_that_lie_at_odd_places(directory: Path) -> None:
    """Nothing in the format promises alignment."""
    right = from_pretrained(directory)
    header, data = split(directory / "model.safetensors")
    write(directory / "model.safetensors", header + b" ", data)
    assert eqx.tree_equal(from_pretrained(directory), right)


# Tensors of other kinds


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32, np.uint8, np.bool_])
def test_dtypes_that_are_no_weights(dtype: Any, directory: Path) -> None:
    right = from_pretrained(directory)
    path = directory / "model.safetensors"
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 13, 13), dtype)}
    save_file(TENSORS | mask, path)
    assert eqx.tree_equal(from_pretrained(directory), right)
    save_file(TENSORS | {"transformer.ln_f.bias": np.ones(10, dtype)}, path)
    with pytest.raises(WeightsError, match=r"ln_f\.bias has dtype \w+, expected F32, BF16, F16"):
        from_pretrained(directory)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8"])
def test_eight_bit_weights(dtype: str, directory: Path) -> None:
    """As quantised models have them, 40 bytes wide where ours are 10 numbers of 4."""
    path = directory / "model.safetensors"
    header, data = split(path)
    write(path, entry(dtype=dtype, shape=[40])(header), data)
    with pytest.raises(WeightsError) as caught:
        from_pretrained(directory)
    assert f"ln_f.bias has dtype {dtype}, expected F32, BF16, F16" in str(caught.value)


def test_tensors_without_numbers(directory: Path) -> None:
    right = from_pretrained(directory)
    path = directory / "model.safetensors"
    save_file(TENSORS | {"transformer.h.0.attn.bias": np.zeros((0, 5), np.float32)}, path)
    assert eqx.tree_equal(from_pretrained(directory), right)
    save_file(TENSORS | {"transformer.wte.weight": np.zeros((0, 10), np.float32)}, path)
    with pytest.raises(WeightsError, match=r"wte\.weight has shape \(0, 10\), the config asks for"):
        from_pretrained(directory)
    save_file(TENSORS | {"lm_head.weight": np.zeros((71, 0), np.float32)}, path)
    with pytest.raises(WeightsError, match=r"lm_head\.weight has shape \(71, 0\)"):
        from_pretrained(directory)


# JSON beside them


def test_damaged_configs(directory: Path) -> None:
    """Another number may be another model; nothing may be another exception."""
    text = (directory / "config.json").read_bytes()
    draw = random.Random(0)
    for i in range(120):
        damaged = (flip, splice, cut_out, other_number)[i % 4](text, draw)
        (directory / "config.json").write_bytes(damaged)
        before = contents(directory)
        with contextlib.suppress(WeightsError):
            from_pretrained(directory)
        assert contents(directory) == before


@pytest.mark.parametrize(
    "value", [None, True, -1, 0.5, 1e400, 2**70, "", "x", [], [1], {}, {"a": 1}]
)
def test_settings_of_the_wrong_type(value: Any, directory: Path) -> None:
    right = from_pretrained(directory)
    for name in CONFIG:
        text = json.dumps(CONFIG | {name: value})
        (directory / "config.json").write_text(text)
        try:
            model = from_pretrained(directory)
        except WeightsError:
            continue
        assert eqx.tree_equal(jax.tree.leaves(model), jax.tree.leaves(right)), name


def test_damaged_indices(tmp_path: Path) -> None:
    sharded = hf_files.write_model(tmp_path, CONFIG, TENSORS, shards=3)
    right = from_pretrained(sharded)
    path = sharded / "model.safetensors.index.json"
    text = path.read_bytes()
    draw = random.Random(0)
    for i in range(120):
        path.write_bytes((flip, splice, cut_out, other_number)[i % 4](text, draw))
        before = contents(sharded)
        try:
            model = from_pretrained(sharded)
        except WeightsError:
            continue
        finally:
            assert contents(sharded) == before
        assert eqx.tree_equal(model, right)


@pytest.mark.parametrize(
    "names",
    [None, 7, "model.safetensors", ["model.safetensors"], {"wte.weight": ["a.safetensors"]},
     {"wte.weight": None}, {"wte.weight": "~/model.safetensors"}, {"x": "a\0.safetensors"},
     {"x": "model.safetensors\n"}, {"x": "\\\\host\\model.safetensors"},
     {"x": "C:model.safetensors"}, {"x": ".safetensors"}, {"x": "a" * 5000 + ".safetensors"}],
)  # fmt: skip
def test_hostile_file_names(names: Any, tmp_path: Path) -> None:
    sharded = hf_files.write_model(tmp_path, CONFIG, TENSORS, shards=2)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(WeightsError):
        from_pretrained(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_without_end(name: str, tmp_path: Path, little_memory: None) -> None:
    sharded = hf_files.write_model(tmp_path, CONFIG, TENSORS, shards=2)
    os.truncate(sharded / name, 2**40)  # a sparse file
    with pytest.raises(WeightsError, match=rf"{name}: .* bytes"):
        from_pretrained(sharded)


# What is no file


def test_links_are_followed_as_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs = hf_files.write_model(tmp_path / "blobs", CONFIG, TENSORS, shards=3)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert eqx.tree_equal(from_pretrained(snapshot), from_pretrained(blobs))


@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "endless", "loop", "dangling"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"]
)
def test_what_is_no_file(name: str, kind: str, tmp_path: Path) -> None:
    sharded = hf_files.write_model(tmp_path, CONFIG, TENSORS, shards=3)
    path = sharded / name
    path.unlink()
    match kind:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case _:
            target = {"device": "/dev/null", "endless": "/dev/zero", "dangling": "nowhere"}[kind]
            path.symlink_to(target)
    with pytest.raises(WeightsError):
        from_pretrained(sharded)
