"""Models from files: `from_pretrained`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT
from eqx_gpt.tree import cast, named_arrays, with_arrays
from weights.errors import WeightsError, raise_problems, read_json
from weights.families import family_of
from weights.family import from_hf
from weights.hub import Source, find, weight_files
from weights.rules import HEAD_KEY, LAYER, KeyMap, Rule, key_shapes
from weights.run import read_run_arrays, read_run_config
from weights.tensors import DTYPES, StoredTensor, aligned_empty, open_tensors

LARGEST_LEAF = 2**48  # numbers; numpy cannot even describe many more
DType = Literal["float32", "bfloat16", "float16"]


def from_pretrained(
    name_or_path: str | Path,
    *,
    dtype: DType | Literal["auto"] = "float32",
    revision: str | None = None,
) -> GPT:
    """A model with its trained weights.

    **Arguments:**

    - `name_or_path`: a name of `eqx_gpt.list_models()`, a hub id `organisation/name`, a local
      directory in the hub's layout, or a run directory (its best checkpoint where it kept one,
      otherwise its last).
    - `dtype`: of the weights and of the computation; norms stay float32 (`eqx_gpt.cast`). `auto`
      is the dtype of the token embedding in the file.
    - `revision`: branch, tag or commit on the hub.

    **Returns:** the model, with dropout 0 unless it comes from a run.

    **Raises:** WeightsError, a ValueError, that names every problem: files missing or damaged,
    settings that our block does not compute, tensors missing, unknown, or of another shape.
    """
    if dtype not in ("auto", *DTYPES.values()):
        raise WeightsError(
            f"dtype must be 'auto', {', '.join(map(repr, DTYPES.values()))}, got {dtype!r}"
        )
    source = find(name_or_path, revision)
    return _load_run(source.path, dtype) if source.kind == "run" else _load_hf(source, dtype)


def skeleton(config: GPTConfig, dtype: str) -> GPT:
    """The model with shapes and dtypes in the place of arrays. Allocates nothing."""
    return eqx.filter_eval_shape(
        lambda key: cast(GPT.init(config, key=key), jnp.dtype(dtype)), jax.random.key(0)
    )


def _load_run(run_dir: Path, dtype: str) -> GPT:
    model = skeleton(read_run_config(run_dir), "float32" if dtype == "auto" else dtype)
    return with_arrays(model, read_run_arrays(run_dir, named_arrays(model)))


def _load_hf(source: Source, dtype: str) -> GPT:
    where = f"{source.location}/config.json"
    hf = read_json(source.file("config.json"))
    family = family_of(hf, where)
    config = from_hf(family, hf, where)
    found = open_tensors(*weight_files(source))
    key_map = family.key_map(config).as_in(found)
    if config.n_layer > len(found):  # before anything is listed layer by layer
        raise WeightsError(
            f"{where} says {config.n_layer} layers, but the files hold {len(found)} tensors in all"
        )
    if dtype == "auto":
        embedding = found.get(key_map.embedding)
        dtype = DTYPES.get(embedding.dtype, "float32") if embedding else "float32"
    model = skeleton(config, dtype)
    leaves = named_arrays(model)
    for name, leaf in leaves.items():
        if math.prod(leaf.shape) > LARGEST_LEAF:
            raise WeightsError(f"{where} asks for {name} of shape {leaf.shape}, which is absurd")
    rules = key_map.all_rules(config.head)
    problems = mismatches(key_map, rules, leaves, found)
    if problems:
        raise_problems(source.location, problems)
    return with_arrays(model, {rule.leaf: _fill(rule, leaves[rule.leaf], found) for rule in rules})


def _fill(rule: Rule, leaf: jax.ShapeDtypeStruct, found: Mapping[str, StoredTensor]) -> jax.Array:
    buffer = aligned_empty(leaf.shape, leaf.dtype)
    for key, view in rule.views(buffer):
        found[key].read_into(view)
    return jax.device_put(buffer)


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
    copied = HEAD_KEY in found and HEAD_KEY not in wanted
    if copied:
        wanted[HEAD_KEY] = wanted[key_map.embedding]
    problems = []
    for key, shape in wanted.items():
        if key not in found:
            problems.append(f"{key} is missing, expected with shape {shape}")
            continue
        if found[key].shape != shape:
            problems.append(f"{key} has shape {found[key].shape}, the config asks for {shape}")
        if found[key].dtype not in DTYPES:
            problems.append(f"{key} has dtype {found[key].dtype}, expected {', '.join(DTYPES)}")
    if copied and not problems and not found[HEAD_KEY].equals(found[key_map.embedding]):
        problems.append(
            f"{HEAD_KEY} differs from {key_map.embedding}, though tie_word_embeddings is true; if "
            "the model has a head of its own, set it to false in config.json"
        )
    n_layer = max(leaf.shape[0] for name, leaf in leaves.items() if name.startswith("blocks."))
    ignored = {t.replace(LAYER, str(i)) for t in key_map.ignored for i in range(n_layer)}
    unknown = sorted(found.keys() - wanted.keys() - ignored)
    return problems + [f"{key} belongs to no part of this model" for key in unknown]
