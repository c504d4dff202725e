"""The architectures of llama.cpp: what the metadata and the tensors of GGUF files mean.

Each is a family whose fields are those of the metadata, without the architecture's name before
them. A field that is called like a tensor says whether the file has it, or what is in it.
What each computes: https://github.com/ggml-org/llama.cpp/tree/master/src/models.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eqx_gpt.config import (
    GPTConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    PositionConfig,
    RopeScaling,
    YarnScaling,
)
from weights.family import Family, Field
from weights.groups import Group, period
from weights.rules import KeyMap, Rule, linear

ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    - `base`: what all its models have, as place in GPTConfig -> value; otherwise GPTConfig's
      defaults.
    - `fields`, `groups`, `refusal`: as of a `Family`.
    - `fused`: queries, keys and values are one tensor.
    - `neighbours`: llama.cpp turns neighbouring dimensions together, and the rows of queries and
      keys lie in the file so that these are our halves.
    """

    name: str
    base: Mapping[str, Any]
    fields: Mapping[str, Field]
    groups: tuple[Group, ...] = ()
    refusal: Callable[[GPTConfig], str | None] = lambda config: None
    fused: bool = False
    neighbours: bool = False

    @property
    def family(self) -> Family:
        return Family(
            model_type=self.name,
            architecture=self.name,
            base=self.base,
            fields={**SIZES, **self.fields},
            key_map=self.key_map,
            groups=(VALUE_LENGTH, *self.groups),
            fixed={"attention.causal": True, "expert_count": 0, "expert_used_count": 0},
            ignored=frozenset({"tensor_data_layout"}),
            refusal=self.refusal,
        )

    def key_map(self, config: GPTConfig) -> KeyMap:
        """The names are the same in all architectures."""
        layer, parts = "blk.{layer}.", config.attention
        bias = {"qkv": parts.qkv_bias, "out": parts.out_bias, "mlp": config.mlp.bias}
        rules: list[Rule] = []
        for leaf, name in NORMS.items():
            if _has_norm(config, leaf):
                there = {"weight": config.norm.scale != "none", "bias": config.norm.bias}
                rules += [Rule(f"{leaf}.{x}", (f"{name}.{x}",)) for x, yes in there.items() if yes]
        qkv = [f"{layer}attn_{x}" for x in "qkv"]
        q_rows, kv_rows = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        rows = (q_rows, kv_rows, kv_rows)
        if self.fused:
            rules += linear("blocks.attention.qkv", layer + "attn_qkv", bias=bias["qkv"])
        else:
            rules += linear("blocks.attention.qkv", *qkv, bias=bias["qkv"], op="fuse", rows=rows)
        rules += linear("blocks.attention.out", layer + "attn_output", bias=bias["out"])
        for name in ("up", "down", *(["gate"] if config.mlp.kind == "gated" else [])):
            rules += linear(f"blocks.mlp.{name}", f"{layer}ffn_{name}", bias=bias["mlp"])
        if config.position.kind == "learned":
            rules.append(Rule("wpe.weight", ("position_embd.weight",)))
        if config.head_bias:
            rules.append(Rule("head.bias", ("output.bias",)))
        return KeyMap(tuple(rules), "token_embd.weight", prefix="", head="output.weight")


NORMS = {
    "blocks.norm1": "blk.{layer}.attn_norm",
    "blocks.post_norm1": "blk.{layer}.post_attention_norm",
    "blocks.norm2": "blk.{layer}.ffn_norm",
    "blocks.post_norm2": "blk.{layer}.post_ffw_norm",
    "blocks.attention.q_norm": "blk.{layer}.attn_q_norm",
    "blocks.attention.k_norm": "blk.{layer}.attn_k_norm",
    "norm": "output_norm",
}
NORMS_OF_RESIDUAL = {
    "pre_norm": ("norm1", "norm2"),
    "post_norm": ("post_norm1", "post_norm2"),
    "sandwich": ("norm1", "post_norm1", "norm2", "post_norm2"),
    "parallel": ("norm1", "norm2"),
    "parallel_shared_norm": ("norm1",),
}


def _has_norm(config: GPTConfig, leaf: str) -> bool:
    name = leaf.rpartition(".")[2]
    if name in ("q_norm", "k_norm"):
        return config.attention.qk_norm != "none"
    return leaf == "norm" or name in NORMS_OF_RESIDUAL[config.residual]


# Fields that only together say something


def _value_length() -> Group:
    """Values are as wide as keys."""

    def read(given: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        if given.get("attention.value_length", config.head_dim) != config.head_dim:
            found = given["attention.value_length"]
            raise ValueError(
                f"attention.value_length is {found!r:.80}, only that of keys, {config.head_dim}, "
                "is supported"
            )
        return config

    def write(config: GPTConfig) -> dict[str, Any]:
        head_dim = config.attention.head_dim
        return {} if head_dim is None else {"attention.value_length": head_dim}

    return Group(frozenset({"attention.value_length"}), read, write)


def _rope() -> Group:
    """Rotary positions of all layers."""
    name = "rope.scaling."
    scaling = ("type", "factor", "original_context_length", "attn_factor", "finetuned")
    names = {"rope.freq_base", "rope.dimension_count", ROPE_FREQS, *(name + x for x in scaling)}

    def read(given: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        dim = given.get("rope.dimension_count", config.head_dim)
        position = PositionConfig(
            "rope",
            rope_theta=given.get("rope.freq_base", 10_000.0),
            rope_dim=None if dim == config.head_dim else dim,
        )
        if given.get(name + "attn_factor", 1.0) != 1.0:
            found = given[name + "attn_factor"]
            raise ValueError(f"{name}attn_factor is {found!r:.80}, only 1.0 is supported")
        kind, factor = given.get(name + "type", "linear"), given.get(name + "factor", 1.0)
        original = given.get(name + "original_context_length", config.block_size)
        stretched: RopeScaling | None = None
        match kind:
            case "linear" if factor != 1.0:
                stretched = LinearScaling(factor)
            case "yarn":
                stretched = YarnScaling(factor, original)
            case "none" | "linear":
                pass
            case _:
                known = "'none', 'linear' and 'yarn' are supported"
                raise ValueError(f"{name}type is {kind!r:.80}, only {known}")
        if ROPE_FREQS in given:
            if stretched is not None:
                raise ValueError(f"both {name}type {kind!r} and {ROPE_FREQS} stretch the positions")
            stretched = _llama3_scaling(given[ROPE_FREQS], position, config)
        position = dataclasses.replace(position, rope_scaling=stretched)
        return dataclasses.replace(config, position=position)

    def write(config: GPTConfig) -> dict[str, Any]:
        position = config.position
        fields: dict[str, Any] = {
            "rope.freq_base": position.rope_theta,
            "rope.dimension_count": position.rope_dim or config.head_dim,
        }
        match position.rope_scaling:
            case LinearScaling(factor=factor):
                fields |= {name + "type": "linear", name + "factor": factor}
            case YarnScaling(factor=factor, original_block_size=original):
                fields |= {name + "type": "yarn", name + "factor": factor}
                fields |= {name + "original_context_length": original}
            case Llama3Scaling() as scaling:
                fields[ROPE_FREQS] = _llama3_factors(scaling, position, config)
            case None:
                pass
        return fields

    return Group(frozenset(names), read, write)


def _llama3_scaling(
    found: tuple[float, ...], position: PositionConfig, config: GPTConfig
) -> RopeScaling | None:
    """The scaling of Llama 3.1 and 3.2 that has these factors; only its `factor` varies."""
    if set(found) == {1.0}:
        return None
    factor, dim = max(found, default=0.0), position.rope_dim or config.head_dim
    if 2 * len(found) == dim and 1.0 < factor < math.inf:
        scaling = Llama3Scaling(float(factor), 1.0, 4.0, 8192)
        expected = _llama3_factors(scaling, position, config)
        if np.allclose(found, expected, rtol=1e-4, atol=0):
            return scaling
    raise ValueError(
        f"{ROPE_FREQS} stretches positions otherwise than Llama 3.1 and 3.2, which is not "
        "supported; take the model from its Hugging Face directory"
    )


def _llama3_factors(
    scaling: Llama3Scaling, position: PositionConfig, config: GPTConfig
) -> tuple[float, ...]:
    """What each wavelength is stretched by."""
    dim = position.rope_dim or config.head_dim
    wavelengths = 2 * np.pi * position.rope_theta ** (np.arange(0, dim, 2) / dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_block_size / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32).tolist())


def _windows(every: int) -> Group:
    """Gemma's layers: of `every` of them, the last sees everything, the others a window.

    Those with a window have a rope of their own in Gemma 3, whose scores have another scale in
    the largest model.
    """
    own_rope, n_layer_27b = every == 6, 62 if every == 6 else 46

    def read(given: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        size = given.get("attention.sliding_window", None if own_rope else 4096)
        pattern = given.get("attention.sliding_window_pattern", every)
        swa_theta = given.get("rope.freq_base_swa", 10_000.0)
        if pattern != every:
            raise ValueError(f"attention.sliding_window_pattern is {pattern!r:.80}, not {every}")
        if own_rope:
            own = PositionConfig("rope", rope_theta=swa_theta)
        elif "rope.freq_base_swa" in given and swa_theta != config.position.rope_theta:
            raise ValueError(f"rope.freq_base_swa is {swa_theta!r:.80}, not rope.freq_base")
        else:
            own = None
        layers = tuple(
            LayerConfig() if i % every == every - 1 or not size else LayerConfig(size, own)
            for i in range(config.n_layer)
        )
        scale = (config.n_embd // config.n_head) ** -0.5 if config.n_layer == n_layer_27b else None
        attention = dataclasses.replace(config.attention, scale=scale)
        return dataclasses.replace(config, layers=period(layers), attention=attention)

    def write(config: GPTConfig) -> dict[str, Any]:
        first = config.layers[0]
        fields: dict[str, Any] = {"attention.sliding_window": first.window}
        if own_rope and first.position is not None:
            fields["rope.freq_base_swa"] = first.position.rope_theta
        return fields

    names = {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
    return Group(frozenset(names), read, write)


def _no_rope(every: int) -> Group:
    """SmolLM3's layers: of `every` of them, the last has no positions."""

    def read(given: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        none = LayerConfig(position=PositionConfig("none"))
        layers = [LayerConfig() if (i + 1) % every else none for i in range(config.n_layer)]
        return dataclasses.replace(config, layers=period(layers))

    return Group(frozenset(), read, lambda config: {})


# The table


def _whole_heads_turn(config: GPTConfig) -> str | None:
    """The file's order of rows would mix dimensions that turn with some that do not."""
    dim = config.position.rope_dim
    return None if dim is None else f"rope.dimension_count is {dim}, only {config.head_dim} is read"


def _heads_fill_the_stream(config: GPTConfig) -> str | None:
    if config.n_head * config.head_dim == config.n_embd:
        return None
    return f"llama.cpp wants heads of {config.n_embd} / {config.n_head}, not {config.head_dim}"


SIZES = {
    "context_length": Field(None, ("block_size",)),
    "embedding_length": Field(None, ("n_embd",)),
    "block_count": Field(None, ("n_layer",)),
    "feed_forward_length": Field(None, ("mlp.n_inner",)),
    "attention.head_count": Field(None, ("n_head",)),
    "attention.head_count_kv": Field(None, ("attention.n_kv_head",)),
    "attention.key_length": Field(None, ("attention.head_dim",)),
    "vocab_size": Field(None, ("vocab_size",)),
}
OPTIONAL = ("attention.head_count_kv", "attention.key_length", "attention.clamp_kqv")
RMS_EPS = {"attention.layer_norm_rms_epsilon": Field(None, ("norm.eps",), kind=float)}
LAYER_EPS = {"attention.layer_norm_epsilon": Field(None, ("norm.eps",), kind=float)}
HEAD = {"output.weight": Field(False, ("head",), {False: "tied", True: "untied"})}
BIASES = {
    "attn_q.bias": Field(False, ("attention.qkv_bias",)),
    "attn_output.bias": Field(False, ("attention.out_bias",)),
    "ffn_up.bias": Field(False, ("mlp.bias",)),
}
CLAMP = {"attention.clamp_kqv": Field(None, ("attention.clip_qkv",), kind=float)}
CAPS = {
    "attn_logit_softcapping": Field(None, ("attention.softcap",), kind=float),
    "final_logit_softcapping": Field(None, ("logit_softcap",), kind=float),
}
PARALLEL = {
    "use_parallel_residual": Field(True, ("residual",), {True: "parallel", False: "pre_norm"})
}

ROPE = {"position.kind": "rope"}
NO_BIASES = {"attention.qkv_bias": False, "attention.out_bias": False, "mlp.bias": False}
LLAMA = {
    "norm.kind": "rmsnorm", "norm.bias": False, "mlp.kind": "gated", "mlp.activation": "silu",
    **ROPE, **NO_BIASES,
}  # fmt: skip
GEMMA = {
    **LLAMA, "norm.scale": "one_plus_weight", "embedding_scale": "sqrt_n_embd",
    "mlp.activation": "gelu_tanh",
}  # fmt: skip
HEAD_NORMS = {"attention.qk_norm": "head"}
SANDWICH = {"residual": "sandwich"}
UNTIED = {"head": "untied"}
VALUE_LENGTH = _value_length()

# The first of those that hold a model equally well is the one written.
_TABLE = (
    Architecture("gpt2", {}, LAYER_EPS | HEAD, refusal=_heads_fill_the_stream, fused=True),
    Architecture(
        "qwen2", LLAMA | {"attention.qkv_bias": True}, RMS_EPS | HEAD, (_rope(),),
        _heads_fill_the_stream,
    ),
    Architecture(
        "llama", LLAMA, RMS_EPS | HEAD | BIASES, (_rope(),), _whole_heads_turn, neighbours=True
    ),
    Architecture("qwen3", LLAMA | HEAD_NORMS, RMS_EPS | HEAD, (_rope(),)),
    Architecture("gemma", GEMMA, RMS_EPS, (_rope(),)),
    Architecture("gemma2", GEMMA | SANDWICH, RMS_EPS | CAPS, (_rope(), _windows(2))),
    Architecture(
        "gemma3", GEMMA | SANDWICH | HEAD_NORMS, RMS_EPS | HEAD, (_rope(), _windows(6))
    ),
    Architecture(
        "phi2", ROPE | UNTIED | {"head_bias": True, "residual": "parallel_shared_norm"}, LAYER_EPS,
        (_rope(),), _heads_fill_the_stream,
    ),
    Architecture(
        "gptneox", ROPE | UNTIED, LAYER_EPS | PARALLEL, (_rope(),), _heads_fill_the_stream,
        fused=True,
    ),
    Architecture("starcoder2", ROPE, LAYER_EPS | HEAD, (_rope(),), _heads_fill_the_stream),
    Architecture(
        "olmo", LLAMA | {"norm.kind": "layernorm", "norm.scale": "none"},
        LAYER_EPS | HEAD | CLAMP, (_rope(),), _whole_heads_turn, neighbours=True,
    ),
    Architecture(
        "olmo2", LLAMA | UNTIED | {"residual": "post_norm", "attention.qk_norm": "all_heads"},
        RMS_EPS, (_rope(),), _heads_fill_the_stream,
    ),
    Architecture(
        "smollm3", LLAMA, RMS_EPS | HEAD, (_rope(), _no_rope(4)), _whole_heads_turn,
        neighbours=True,
    ),
)  # fmt: skip
ARCHITECTURES = {architecture.name: architecture for architecture in _TABLE}
