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


GPT_NEOX_CONFIG: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 56,
    "max_position_embeddings": 11,
}


def gpt_neox_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random tensors of a GPT-NeoX, as `GPTNeoXForCausalLM` names and lays them."""
    random = np.random.default_rng(0)
    d, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "gpt_neox.embed_in.weight": (vocab, d),
        "gpt_neox.final_layer_norm.weight": (d,),
        "gpt_neox.final_layer_norm.bias": (d,),
        "embed_out.weight": (vocab, d),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}{name}.weight": (d,), f"{layer}{name}.bias": (d,)}
        for name, n_out, n_in in (
            ("attention.query_key_value", 3 * d, d),
            ("attention.dense", d, d),
            ("mlp.dense_h_to_4h", inner, d),
            ("mlp.dense_4h_to_h", d, inner),
        ):
            shapes |= {f"{layer}{name}.weight": (n_out, n_in), f"{layer}{name}.bias": (n_out,)}
    return {key: random.normal(size=s).astype(np.float32) for key, s in shapes.items()}


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
