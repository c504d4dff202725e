"""Files as the hub has them, made without torch and without this project's key rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GPT2_CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 71,
    "n_positions": 13,
    "n_ctx": 13,
    "n_embd": 10,
    "n_layer": 3,
    "n_head": 5,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "attn_pdrop": 0.1,
    "initializer_range": 0.02,
    "bos_token_id": 50256,
}


def gpt2_tensors(config: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Random tensors of a GPT-2, as `GPT2Model` names and lays them."""
    random = np.random.default_rng(0)
    d = config["n_embd"]

    def layer_norm() -> dict[str, tuple[int, ...]]:
        return {"weight": (d,), "bias": (d,)}

    def conv1d(n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (n_in, n_out), "bias": (n_out,)}

    modules: dict[str, dict[str, tuple[int, ...]]] = {
        "wte": {"weight": (config["vocab_size"], d)},
        "wpe": {"weight": (config["n_positions"], d)},
        "ln_f": layer_norm(),
    }
    for i in range(config["n_layer"]):
        modules |= {
            f"h.{i}.ln_1": layer_norm(),
            f"h.{i}.attn.c_attn": conv1d(d, 3 * d),
            f"h.{i}.attn.c_proj": conv1d(d, d),
            f"h.{i}.ln_2": layer_norm(),
            f"h.{i}.mlp.c_fc": conv1d(d, 4 * d),
            f"h.{i}.mlp.c_proj": conv1d(4 * d, d),
        }
    return {
        f"{prefix}{module}.{part}": random.normal(size=shape, scale=0.5).astype(np.float32)
        for module, parts in modules.items()
        for part, shape in parts.items()
    }


def write_model(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    index: dict[str, str] = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory
