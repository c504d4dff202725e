"""What families share: Llama's block and names of sizes and keys; norms; separate q, k and v."""

from collections.abc import Mapping
from typing import Any

from eqx_gpt.config import GPTConfig
from weights.family import Field
from weights.rules import KeyMap, Rule, linear

LLAMA_BLOCK: Mapping[str, Any] = {
    "norm.kind": "rmsnorm",
    "norm.bias": False,
    "position.kind": "rope",
    "mlp.kind": "gated",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "hidden_size": "n_embd",
    "intermediate_size": "mlp.n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "attention.n_kv_head",
}


def llama_sizes(**defaults: int | None) -> dict[str, Field]:
    """The sizes by Llama's names, with transformers' default for each of `_SIZES`."""
    return {name: Field(defaults[name], (place,)) for name, place in _SIZES.items()}


def norm(leaf: str, key: str, config: GPTConfig) -> list[Rule]:
    """The rules of a norm's weight and bias, as far as it has them."""
    parts = {"weight": config.norm.scale != "none", "bias": config.norm.bias}
    return [Rule(f"{leaf}.{part}", (f"{key}.{part}",)) for part, there in parts.items() if there]


def separate_qkv(config: GPTConfig, *keys: str) -> list[Rule]:
    """The rules of q, k and v with a key each, all in the leaf `qkv`."""
    q_rows, kv_rows = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    bias, rows = config.attention.qkv_bias, (q_rows, kv_rows, kv_rows)
    return linear("blocks.attention.qkv", *keys, bias=bias, op="fuse", rows=rows)


def llama_like(
    config: GPTConfig,
    *,
    norms: Mapping[str, str],
    mlp: Mapping[str, str] | None = None,
    qk_norms: tuple[str, str] = ("q_norm", "k_norm"),
    out: str = "o_proj",
    final_norm: str = "norm",
) -> KeyMap:
    """The keys of Llama and of all that took its names.

    **Arguments:**

    - `norms`: each norm of the block, and its name in the files.
    - `mlp`: each linear map of the mlp likewise; None is Llama's.
    - `qk_norms`, `out`, `final_norm`: names in the files.
    """
    layer = "model.layers.{layer}."
    attention = layer + "self_attn."
    mlp = mlp or {"up": "up_proj", "gate": "gate_proj", "down": "down_proj"}
    rules = [
        *separate_qkv(config, *(f"{attention}{x}_proj" for x in "qkv")),
        *linear("blocks.attention.out", attention + out, bias=config.attention.out_bias),
        *norm("norm", f"model.{final_norm}", config),
    ]
    for leaf, name in norms.items():
        rules += norm(f"blocks.{leaf}", layer + name, config)
    if config.attention.qk_norm != "none":
        for leaf, name in zip(("q_norm", "k_norm"), qk_norms, strict=True):
            rules += norm(f"blocks.attention.{leaf}", attention + name, config)
    for leaf, name in mlp.items():
        rules += linear(f"blocks.mlp.{leaf}", f"{layer}mlp.{name}", bias=config.mlp.bias)
    if config.head_bias:
        rules.append(Rule("head.bias", ("lm_head.bias",)))
    return KeyMap(
        rules=tuple(rules),
        embedding="model.embed_tokens.weight",
        prefix="model.",
        ignored=(attention + "rotary_emb.inv_freq",),  # a table, in old files
    )


PRE_NORM = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
SANDWICH = {
    "norm1": "input_layernorm",
    "post_norm1": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm",
    "post_norm2": "post_feedforward_layernorm",
}
