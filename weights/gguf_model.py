"""The model in a GGUF file: its config, and its tensors in the order of our leaves."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from eqx_gpt.config import GPTConfig, did_you_mean
from weights.errors import WeightsError, raise_problems
from weights.family import from_hf
from weights.gguf_architectures import ARCHITECTURES, OPTIONAL, ROPE_FREQS, Architecture
from weights.gguf_file import ArrangedRows, GGUFFile, read_gguf
from weights.rules import KeyMap
from weights.tensors import DTYPES, StoredTensor


def open_gguf(path: Path) -> tuple[GPTConfig, KeyMap, dict[str, StoredTensor]]:
    """The config of the model in a GGUF file, where its leaves lie, and its tensors by name.

    WeightsError names everything in the metadata that our block does not compute.
    """
    file = read_gguf(path)
    architecture = architecture_of(file)
    config = from_hf(architecture.family, _settings(file, architecture), str(path))
    tensors = {
        name: dataclasses.replace(tensor, rows=_arranged(tensor, architecture, name, config))
        for name, tensor in file.tensors.items()
        if name != ROPE_FREQS
    }
    return config, architecture.key_map(config), tensors


def architecture_of(file: GGUFFile) -> Architecture:
    """WeightsError if the file is no model, or one of an architecture that is not known here."""
    kind = file.metadata.get("general.type", "model")
    name = file.metadata.get("general.architecture")
    if kind != "model":
        raise WeightsError(f"{file.path}: general.type is {kind!r:.80}, expected 'model'")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        near = did_you_mean(str(name)[:80], ARCHITECTURES)
        raise WeightsError(f"{file.path}: unknown architecture {name!r:.80}; {near}")
    return ARCHITECTURES[name]


def _settings(file: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """What `architecture.family` reads: the metadata of the model, and what its tensors say."""
    prefix = architecture.name + "."
    settings: dict[str, Any] = {}
    for key, value in file.metadata.items():
        if key.startswith(prefix):
            # Some are given layer by layer.
            same = isinstance(value, list) and value and all(x == value[0] for x in value)
            settings[key.removeprefix(prefix)] = value[0] if same else value
    problems = []
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        problems.append("token_embd.weight is missing")
    elif settings.setdefault("vocab_size", embedding.shape[0]) != embedding.shape[0]:
        found = settings["vocab_size"]
        problems.append(f"vocab_size is {found!r:.80}, token_embd.weight has {embedding.shape[0]}")
    for name, field in architecture.family.fields.items():
        if "." in name and name.endswith((".weight", ".bias")):
            settings[name] = name in file.tensors or f"blk.0.{name}" in file.tensors
        elif field.default is None and name not in OPTIONAL and name not in settings:
            problems.append(f"{prefix}{name} is missing")
    n_layer = settings.get("block_count")
    if isinstance(n_layer, int) and n_layer > len(file.tensors):
        problems.append(f"block_count is {n_layer}, but there are {len(file.tensors)} tensors")
    if ROPE_FREQS in file.tensors:
        factors = file.tensors[ROPE_FREQS]
        known = factors.dtype in DTYPES
        settings[ROPE_FREQS] = tuple(np.ravel(factors.rows[:]).tolist()) if known else ()
    if problems:
        raise_problems(str(file.path), problems)
    return settings


def file_rows(
    architecture: Architecture, name: str, n_row: int, config: GPTConfig
) -> np.ndarray | None:
    """Which of our rows each of the tensor's `n_row` in the file is; None if they lie as ours."""
    part = name.rsplit(".", 2)[-2:-1]
    if not architecture.neighbours or part not in (["attn_q"], ["attn_k"]):
        return None
    if n_row % config.head_dim:
        return None  # and the shape is refused
    return np.arange(n_row).reshape(-1, 2, config.head_dim // 2).swapaxes(1, 2).ravel()


def added(name: str, config: GPTConfig) -> float:
    """What the numbers in the file are above ours: the 1 of `one_plus_weight`."""
    return float(name.endswith("norm.weight") and config.norm.scale == "one_plus_weight")


def _arranged(
    tensor: StoredTensor, architecture: Architecture, name: str, config: GPTConfig
) -> ArrangedRows:
    rows = file_rows(architecture, name, tensor.shape[0], config)
    return ArrangedRows(
        tensor.rows, None if rows is None else np.argsort(rows), -added(name, config)
    )
