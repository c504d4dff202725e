"""Models to GGUF files, which llama.cpp runs: `save_gguf`."""

import dataclasses
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eqx_gpt.config import GPTConfig, did_you_mean
from eqx_gpt.gpt import GPT
from eqx_gpt.tokenizer import GPT2Tokenizer, JSONTokenizer, Tokenizer
from weights.directory import sync
from weights.errors import WeightsError
from weights.family import closest, to_hf
from weights.gguf_architectures import ARCHITECTURES, Architecture
from weights.gguf_model import added, file_rows
from weights.gguf_tokenizer import write_tokenizer
from weights.save import Tensors, check_saveable, tensors_of
from weights.tokenizer import gpt2_tokenizer_json

GGUFType = Literal["F32", "F16", "BF16", "Q8_0"]
TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""What llama.cpp calls a file whose large tensors are of a type (`general.file_type`)."""


def save_gguf(
    model: GPT,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: GGUFType = "F16",
) -> None:
    """Writes a model as a file that llama.cpp loads. It is there whole or not at all.

    Biases that the architecture has and the model lacks are written as zeros; padding rows of the
    vocabulary are not written. Vectors and position tables stay F32, as llama.cpp wants them.

    **Arguments:**

    - `tokenizer`: GPT-2's or a JSONTokenizer; without one, llama.cpp takes and gives ids only.
    - `dtype`: of the matrices. Q8_0 is 8 bits and a scale for each 32 numbers; matrices whose
      rows are no multiple of 32 are F16 then.

    **Raises:** WeightsError if no architecture of llama.cpp computes the model, or none of its
    ways to split text is the tokenizer's, with what is in the way.
    """
    check_saveable(model)
    target = check_target(path)
    if dtype not in TYPES:
        raise WeightsError(f"dtype {dtype!r} cannot be written; {did_you_mean(dtype, TYPES)}")
    architecture, config = _architecture_for(model.config)
    metadata = {
        "general.type": "model",
        "general.file_type": TYPES[dtype],
        "general.quantization_version": 2,
        **_tokenizer_metadata(tokenizer, config.vocab_size),
    }
    tensors = tensors_of(model, config, architecture.key_map(config), model.wte.weight.dtype.name)
    settings = {k: v for k, v in to_hf(architecture.family, config).items() if v is not None}
    for name, value in settings.items():
        if not name.endswith((".weight", ".bias")):
            metadata[f"{architecture.name}.{name}"] = value
        elif isinstance(value, tuple):
            tensors[name] = (np.array(value, np.float32), (len(value),))
    with _replacing(target) as partial:
        _write(partial, architecture, config, metadata, tensors, dtype)


def check_target(path: str | Path) -> Path:
    """Where a model may be written. WeightsError if `path` does not end in .gguf, or if what is
    there is no GGUF file."""
    target = Path(path).expanduser().resolve()
    if target.suffix.lower() != ".gguf":
        raise WeightsError(f"{target}: the name of a GGUF file ends in .gguf; give such a path")
    if target.exists() and not target.is_file():
        raise WeightsError(f"{target} is a directory; give the path of a file")
    if target.exists() and target.stat().st_size:
        with target.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise WeightsError(
                    f"{target} is no GGUF file, and is not replaced; give another path or move it"
                )
    return target


def _architecture_for(config: GPTConfig) -> tuple[Architecture, GPTConfig]:
    """An architecture whose files hold a model of `config`, and the config as they hold it.

    Of several, the one that needs the fewest zeros for biases that the model lacks.
    """
    refusals: list[tuple[str, list[str]]] = []
    holding = []
    for architecture in ARCHITECTURES.values():
        held, reasons = closest(architecture.family, config)
        if reasons:
            refusals.append((architecture.name, reasons))
        else:
            holding.append((_n_biases(held), architecture, held))
    if not holding:
        name, reasons = min(refusals, key=lambda refusal: sum(map(len, refusal[1])))
        raise WeightsError(
            f"no architecture of llama.cpp known here holds this model; the nearest, {name}, does "
            f"not since {'; '.join(reasons)}. Save a Hugging Face directory instead"
        )
    _, architecture, held = min(holding, key=lambda found: found[0])
    return architecture, _explicit(held)


def _n_biases(config: GPTConfig) -> int:
    parts = config.attention
    return sum([config.norm.bias, parts.qkv_bias, parts.out_bias, config.mlp.bias])


def _explicit(config: GPTConfig) -> GPTConfig:
    """The same, with the sizes that GGUF wants said."""
    usual = config.n_embd // config.n_head == config.head_dim and not config.n_embd % config.n_head
    return dataclasses.replace(
        config,
        attention=dataclasses.replace(
            config.attention,
            n_kv_head=config.n_kv_head,
            head_dim=None if usual else config.head_dim,
        ),
        mlp=dataclasses.replace(config.mlp, n_inner=config.n_inner),
    )


def _tokenizer_metadata(tokenizer: Tokenizer | None, n_vocab: int) -> dict[str, Any]:
    match tokenizer:
        case None:
            return {"tokenizer.ggml.model": "none"}
        case GPT2Tokenizer():
            special = tokenizer.special_tokens
            text = gpt2_tokenizer_json()
            return write_tokenizer(JSONTokenizer(text, special["eos_token"], special), n_vocab)
        case JSONTokenizer():
            return write_tokenizer(tokenizer, n_vocab)
    raise WeightsError(
        f"llama.cpp has no tokenizer like {type(tokenizer).__name__}; leave it out, and ids go in "
        "and come out"
    )


def _write(
    path: Path,
    architecture: Architecture,
    config: GPTConfig,
    metadata: Mapping[str, Any],
    tensors: Tensors,
    dtype: GGUFType,
) -> None:
    # Imported where used: `import weights` stays fast.
    from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape

    writer = GGUFWriter(path, architecture.name)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        kinds = {name: _type_of(name, shape, dtype) for name, (_, shape) in tensors.items()}
        for name, (_, shape) in tensors.items():
            kind = GGMLQuantizationType[kinds[name]]
            row_bytes = quant_shape_to_byte_shape(shape, kind)
            n_bytes = math.prod(row_bytes)
            writer.add_tensor_info(name, row_bytes, np.dtype(np.uint8), n_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (view, shape) in tensors.items():
            numbers = np.ascontiguousarray(view, np.float32).reshape(shape)
            rows = file_rows(architecture, name, shape[0], config)
            numbers = numbers if rows is None else numbers[rows]
            writer.write_tensor_data(_encoded(name, numbers + added(name, config), kinds[name]))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _type_of(name: str, shape: tuple[int, ...], dtype: GGUFType) -> str:
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    return "F16" if dtype == "Q8_0" and shape[-1] % 32 else dtype


def _encoded(name: str, numbers: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of a tensor. WeightsError if F16 is too small for a number."""
    from gguf import GGMLQuantizationType, quantize

    with np.errstate(over="ignore"):
        encoded = quantize(numbers, GGMLQuantizationType[kind])
    if kind == "F16" and not np.isfinite(encoded[np.isfinite(numbers)]).all():
        raise WeightsError(
            f"{name} has numbers beyond 65504, the largest of F16; write BF16 or F32 instead"
        )
    return encoded


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file beside `target` to write, which takes its place if all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.new-{uuid.uuid4().hex}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, target)
        sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)
