"""Models to files: `save_pretrained`."""

import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from eqx_gpt.config import GPTConfig, did_you_mean
from eqx_gpt.gpt import GPT
from eqx_gpt.lora import adapters
from eqx_gpt.tokenizer import Tokenizer
from eqx_gpt.tree import named_arrays
from weights import directory as directories
from weights.directory import replacing
from weights.errors import WeightsError, write_json
from weights.families import family_for
from weights.family import to_hf
from weights.load import DType, skeleton
from weights.rules import KeyMap, tensor_shape
from weights.tensors import DTYPES
from weights.tokenizer import special_ids, write_tokenizer

Tensors = dict[str, tuple[np.ndarray, tuple[int, ...]]]
"""By key, a view whose numbers are the tensor's in its order, and the shape of the tensor."""
INDEX = "model.safetensors.index.json"
WRITTEN_HERE = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|"
    r"model\.safetensors\.index\.json|tokenizer(_config|_spec)?\.json|chat_template\.jinja"
)


def save_pretrained(
    model: GPT,
    directory: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: DType | None = None,
    model_type: str | None = None,
    max_shard_bytes: int | float = 5e9,
) -> None:
    """Writes a model as a directory that transformers' `AutoModelForCausalLM` loads.

    The directory is there whole or not at all. One that is there already is replaced only if it
    holds nothing but what this function writes.

    Biases that the architecture has and the model lacks are written as zeros; padding rows of the
    vocabulary are not written.

    **Arguments:**

    - `tokenizer`: GPT-2's or a JSONTokenizer is written for `AutoTokenizer`; any other, such as
      characters, as `tokenizer_spec.json`, which only `load_tokenizer` reads.
    - `dtype`: of every tensor in the file; None is the dtype of the token embedding.
    - `model_type`: of transformers, where several hold the model: a Mistral without its window is
      a Llama too. None is the first that fits, GPT-2 and Llama before others.
    - `max_shard_bytes`: a larger model is split into files of at most that size (and at least
      one tensor each).

    **Raises:** WeightsError if no Hugging Face architecture holds the model, with what is in the
    way; if the tokenizer has more tokens than the model; if the directory holds other things.
    """
    check_saveable(model)
    target = check_target(directory)
    family, config = family_for(model.config, model_type)
    dtype_name = model.wte.weight.dtype.name if dtype is None else dtype
    if dtype_name not in DTYPES.values():
        raise WeightsError(
            f"dtype {dtype_name!r} cannot be written; {did_you_mean(dtype_name, DTYPES.values())}"
        )
    if tokenizer is not None:
        # Gemma 3's tokenizer has a token for images, which its text models have no embedding of.
        n_token = getattr(tokenizer, "n_trained", tokenizer.vocab_size)
        if n_token > config.vocab_size:
            raise WeightsError(
                f"the tokenizer has {n_token} tokens, the model {config.vocab_size}; give the "
                "tokenizer that the model was trained with"
            )
    tensors = tensors_of(model, config, family.key_map(config), dtype_name)
    special = _special_ids(tokenizer, family.model_type, config.vocab_size)
    described = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype_name,
        **to_hf(family, config),
        "pad_token_id": None,  # rather than the family's default, which no tokenizer vouches for
        **special,
    }
    with replacing(target) as partial:
        write_json(partial / "config.json", described)
        write_json(partial / "generation_config.json", special)
        _write_shards(tensors, partial, jnp.dtype(dtype_name), max_shard_bytes)
        if tokenizer is not None:
            write_tokenizer(tokenizer, partial, config.block_size)


def check_saveable(model: GPT) -> None:
    """WeightsError for a model that is laid out for decoding, or that has adapters."""
    if adapters(model):
        raise WeightsError(
            "this model has low-rank adapters; save eqx_gpt.lora.merge(model), or the adapters "
            "alone with weights.save_adapter"
        )
    if isinstance(model.blocks, tuple):
        raise WeightsError(
            "this model is laid out for decoding, with smaller numbers (eqx_gpt.for_inference); "
            "save the model that it was made from"
        )


def check_target(directory: str | Path) -> Path:
    """Where a model may be written. WeightsError if that would destroy something else."""
    return directories.check_target(directory, WRITTEN_HERE, "a saved model")


def tensors_of(model: GPT, config: GPTConfig, key_map: KeyMap, dtype_name: str) -> Tensors:
    """The tensors of a file that holds the model as `config` says.

    Biases that the model lacks are zeros; padding of the vocabulary is left out.
    """
    held = named_arrays(skeleton(config, dtype_name))
    ours = named_arrays(model)
    tensors: Tensors = {}
    for rule in key_map.all_rules(config.head):
        shape = held[rule.leaf].shape
        if rule.leaf in ours:
            # Only tables of the vocabulary have more rows than the file.
            leaf = np.asarray(ours[rule.leaf])[: shape[0]]
        else:
            leaf = np.broadcast_to(np.zeros((), jnp.dtype(dtype_name)), shape)
        for key, view in rule.views(leaf):
            tensors[key] = (view, tensor_shape(rule, view))
    return tensors


def _special_ids(
    tokenizer: Tokenizer | None, model_type: str, vocab_size: int
) -> dict[str, int | list[int] | None]:
    if tokenizer is not None:
        return special_ids(tokenizer)
    end = 50256 if (model_type, vocab_size) == ("gpt2", 50257) else None
    return {"bos_token_id": end, "eos_token_id": end}


def _write_shards(
    tensors: Tensors, directory: Path, dtype: np.dtype, max_bytes: int | float
) -> None:
    """One file, or several and their index. Each is cast and laid out only when written."""
    from safetensors.numpy import save_file

    shards: list[Tensors] = [{}]
    room = max_bytes
    for key, (view, shape) in tensors.items():
        n_bytes = view.size * dtype.itemsize
        if n_bytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][key] = (view, shape)
        room -= n_bytes
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        one = len(shards) == 1
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        name = "model.safetensors" if one else name
        index |= dict.fromkeys(shard, name)
        laid_out = {k: np.ascontiguousarray(v, dtype).reshape(s) for k, (v, s) in shard.items()}
        save_file(laid_out, directory / name, metadata={"format": "pt"})
        # The library makes its files readable to their owner alone.
        shutil.copymode(directory / "config.json", directory / name)
    if len(shards) > 1:
        total = sum(view.size for view, _ in tensors.values()) * dtype.itemsize
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
