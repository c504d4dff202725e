"""Models from files: `from_pretrained`."""

import math
import os
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eqx_gpt import lora
from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT
from eqx_gpt.sharding import shardings
from eqx_gpt.tree import cast, named_arrays, with_arrays
from weights.adapters import base_of, check_target, load_adapter, save_adapter
from weights.errors import WeightsError, raise_problems, read_json
from weights.families import family_of
from weights.family import from_hf
from weights.gguf_model import open_gguf
from weights.hub import Source, find, weight_files
from weights.rules import LAYER, KeyMap, Rule, key_shapes
from weights.run import read_run_arrays, read_run_config, read_run_lora
from weights.tensors import DTYPES, StoredTensor, aligned_empty, open_tensors, row_blocks

MOST_THREADS = 4  # memory is the limit, not arithmetic
LARGEST_LEAF = 2**48  # numbers; numpy cannot even describe many more
DType = Literal["float32", "bfloat16", "float16"]


def from_pretrained(
    name_or_path: str | Path,
    *,
    dtype: DType | Literal["auto"] = "float32",
    revision: str | None = None,
    mesh: Mesh | None = None,
    merge: bool = True,
) -> GPT:
    """A model with its trained weights.

    **Arguments:**

    - `name_or_path`: a name of `eqx_gpt.list_models()`, a hub id `organisation/name`, a local
      directory in the hub's layout, a `.gguf` file of llama.cpp, a run directory (its best
      checkpoint where it kept one, otherwise its last), or a local directory of adapters in
      PEFT's format, which says what model they adapt.
    - `dtype`: of the weights and of the computation; norms stay float32 (`eqx_gpt.cast`). `auto`
      is the dtype of the token embedding in the file, float32 where that is quantised.
    - `revision`: branch, tag or commit on the hub.
    - `mesh`: the devices to split the model over, as `eqx_gpt.sharding` says; None is the first
      device. Each shard is read by itself: in the memory of the host there is no more at a time.
    - `merge`: low-rank adapters, of a run or of such a directory, become part of the weights;
      False keeps them apart.

    **Returns:** the model, with dropout 0 unless it comes from a run.

    **Raises:** WeightsError, a ValueError, that names every problem: files missing or damaged,
    settings that our block does not compute, tensors missing, unknown, or of another shape.
    """
    if dtype not in ("auto", *DTYPES.values()):
        raise WeightsError(
            f"dtype must be 'auto', {', '.join(map(repr, DTYPES.values()))}, got {dtype!r}"
        )
    source = find(name_or_path, revision)
    if source.kind == "run":
        return _load_run(source.path, dtype, mesh, merge)
    if source.kind == "adapter":
        return _load_adapted(source, dtype, mesh, merge)
    return _load_files(source, dtype, mesh)


def model_type_of(name_or_path: str | Path, *, revision: str | None = None) -> str | None:
    """What the config.json of the model (or of the one adapted) calls its family; None of a run
    or a GGUF file.

    WeightsError as `from_pretrained`.
    """
    source = find(name_or_path, revision)
    if source.kind == "adapter":
        return model_type_of(base_of(source))
    if source.kind not in ("directory", "hub"):
        return None
    where = f"{source.location}/config.json"
    return family_of(read_json(source.file("config.json")), where).model_type


def convert_adapter(source: str | Path, target: str | Path) -> None:
    """The adapters of a run, or of a directory of PEFT, alone as such a directory.

    WeightsError as `from_pretrained` and `save_adapter`.
    """
    check_target(target)
    model, found = from_pretrained(source, merge=False), find(source)
    base = base_of(found) if found.kind in ("run", "adapter") else None
    save_adapter(model, target, base=base, model_type=model_type_of(source))


@lru_cache(maxsize=4)
def skeleton(config: GPTConfig, dtype: str) -> GPT:
    """The model with shapes and dtypes in the place of arrays. Allocates nothing."""
    return eqx.filter_eval_shape(
        lambda: cast(GPT.init(config, key=jax.random.key(0)), jnp.dtype(dtype))
    )


def _placed(model: GPT, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """What each leaf of a skeleton is to be, and where."""
    try:
        where = {} if mesh is None else shardings(model, mesh)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    here = jax.device_put(np.float32(0)).sharding
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where.get(name, here))
        for name, x in named_arrays(model).items()
    }


def _load_run(run_dir: Path, dtype: str, mesh: Mesh | None, merge: bool) -> GPT:
    dtype = "float32" if dtype == "auto" else dtype
    adapters = read_run_lora(run_dir)
    # Merged in float32, and only then rounded.
    model = skeleton(read_run_config(run_dir), "float32" if merge and adapters else dtype)
    if adapters is not None:
        model = eqx.filter_eval_shape(lora.init, model, adapters, key=jax.random.key(0))
        model = model if merge else eqx.filter_eval_shape(cast, model, jnp.dtype(dtype))
    model = with_arrays(model, read_run_arrays(run_dir, _placed(model, mesh)))
    return cast(lora.merge(model), jnp.dtype(dtype)) if merge and adapters else model


def _load_adapted(
    source: Source, dtype: DType | Literal["auto"], mesh: Mesh | None, merge: bool
) -> GPT:
    base = base_of(source)
    model = from_pretrained(base, dtype="auto" if dtype == "auto" else "float32", mesh=mesh)
    result = model.wte.weight.dtype if dtype == "auto" else jnp.dtype(dtype)
    model = load_adapter(model, source.location, model_type=model_type_of(base))
    return cast(lora.merge(model) if merge else model, result)


def _open_hf(source: Source) -> tuple[GPTConfig, KeyMap, dict[str, StoredTensor]]:
    where = f"{source.location}/config.json"
    hf = read_json(source.file("config.json"))
    family = family_of(hf, where)
    config = from_hf(family, hf, where)
    found = open_tensors(*weight_files(source))
    return config, family.key_map(config).as_in(found), found


def _load_files(source: Source, dtype: str, mesh: Mesh | None) -> GPT:
    gguf = source.kind == "gguf"
    where = source.location if gguf else f"{source.location}/config.json"
    config, key_map, found = open_gguf(source.path) if gguf else _open_hf(source)
    if config.n_layer > len(found):  # before anything is listed layer by layer
        raise WeightsError(
            f"{where} says {config.n_layer} layers, but the files hold {len(found)} tensors in all"
        )
    if dtype == "auto":
        embedding = found.get(key_map.embedding)
        dtype = DTYPES.get(embedding.dtype, "float32") if embedding else "float32"
    model = skeleton(config, dtype)
    leaves = _placed(model, mesh)
    for name, leaf in leaves.items():
        if math.prod(leaf.shape) > LARGEST_LEAF:
            raise WeightsError(f"{where} asks for {name} of shape {leaf.shape}, which is absurd")
    rules = key_map.all_rules(config.head)
    problems = mismatches(key_map, rules, leaves, found)
    if problems:
        raise_problems(source.location, problems)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        return with_arrays(model, {r.leaf: _read(r, leaves[r.leaf], found, threads) for r in rules})


def _read(
    rule: Rule, leaf: jax.ShapeDtypeStruct, found: Mapping[str, StoredTensor], threads: Executor
) -> jax.Array:
    """A leaf where its sharding says; in the memory of the host, one shard at a time."""
    assert leaf.sharding is not None
    indices: Mapping[Any, Any] = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    devices: dict[tuple[range, ...], list[Any]] = {}
    for device, index in indices.items():
        box = tuple(range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(box, []).append(device)
    shards = []
    for box, (first, *others) in devices.items():
        shards.append(jax.device_put(_read_box(rule, box, leaf, found, threads), first))
        shards += [jax.device_put(shards[-1], other) for other in others]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _read_box(
    rule: Rule,
    box: tuple[range, ...],
    leaf: jax.ShapeDtypeStruct,
    found: Mapping[str, StoredTensor],
    threads: Executor,
) -> np.ndarray:
    part = aligned_empty(tuple(map(len, box)), leaf.dtype)
    n_rows = leaf.shape[1 if rule.stacked else 0]
    reads = []
    for key, view, (rows, *others) in rule.reads(part, box, n_rows):
        for block in row_blocks(rows.start, view.shape):
            of_view = view[block.start - rows.start : block.stop - rows.start]
            reads.append(threads.submit(found[key].read_into, of_view, (block, *others)))
    for read in reads:
        read.result()
    return part


def mismatches(
    key_map: KeyMap,
    rules: list[Rule],
    leaves: Mapping[str, Any],
    found: Mapping[str, StoredTensor],
) -> list[str]:
    """Everything that keeps the tensors of a file from being exactly the leaves of a model.

    Exactly one rule fills each leaf, and each key is read by exactly one rule, ignored by name,
    or the copy of a tied embedding.
    """
    filled = [rule.leaf for rule in rules]
    assert sorted(filled) == sorted(leaves), "the rules of a family fill each leaf once"
    wanted: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        shapes = key_shapes(rule, leaves[rule.leaf].shape)
        assert not wanted.keys() & shapes, "the rules of a family read each key once"
        wanted |= shapes
    copied = key_map.head in found and key_map.head not in wanted
    if copied:
        wanted[key_map.head] = wanted[key_map.embedding]
    problems = []
    for key, shape in wanted.items():
        if key not in found:
            problems.append(f"{key} is missing, expected with shape {shape}")
            continue
        if found[key].shape != shape:
            problems.append(f"{key} has shape {found[key].shape}, the config asks for {shape}")
        if found[key].dtype not in DTYPES:
            problems.append(f"{key} has dtype {found[key].dtype}, expected {', '.join(DTYPES)}")
    if copied and not problems and not found[key_map.head].equals(found[key_map.embedding]):
        problems.append(
            f"{key_map.head} differs from {key_map.embedding}, though tie_word_embeddings is true; "
            "if the model has a head of its own, set it to false in config.json"
        )
    n_layer = max(leaf.shape[0] for name, leaf in leaves.items() if name.startswith("blocks."))
    ignored = {t.replace(LAYER, str(i)) for t in key_map.ignored for i in range(n_layer)}
    unknown = sorted(found.keys() - wanted.keys() - ignored)
    return problems + [f"{key} belongs to no part of this model" for key in unknown]
