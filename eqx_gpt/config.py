"""Frozen configurations of a model. Nothing here imports jax.

A `GPTConfig` says what a model is, in the words of nanoGPT; its sub-configs say how the generic
block (`layers/block.py`) is made. The defaults are GPT-2's. Combinations that mean nothing are
refused when the config is built.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

SHOWN = 40  # names that an error lists


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence about an unknown `name`: the near names, or the first ones."""
    known = list(known)
    folded = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(folded[other]) for other in near)}?"
    more = f", ... {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"known: {', '.join(known[:SHOWN])}{more}"


def _known_fields(cls: type, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__}: expected an object of fields, got {values!r}")
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no field {name!r}; {did_you_mean(name, known)}")
    return values


def _check_choice(config: Any, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in choices:
        raise ValueError(
            f"{type(config).__name__}: {field} must be one of {', '.join(map(repr, choices))}, "
            f"got {value!r}"
        )


def _check_positive_int(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: {name} must be a whole number above 0, got {value!r}")


def _check_positive(config: Any, *fields: str) -> None:
    """Of those that are not None."""
    for field in fields:
        value = getattr(config, field)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < float("inf")):
            owner = type(config).__name__
            raise ValueError(f"{owner}: {field} must be a number above 0, got {value!r}")


@dataclass(frozen=True)
class NormConfig:
    """Layer norm (Ba et al. 2016, arXiv:1607.06450) or RMS norm (arXiv:1910.07467).

    `scale` is what multiplies the normalised numbers: the weight, 1 + the weight (Gemma), or
    nothing (OLMo), and then there is no bias either.
    """

    kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    eps: float = 1e-5
    bias: bool = True
    scale: Literal["weight", "one_plus_weight", "none"] = "weight"

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("layernorm", "rmsnorm"))
        _check_choice(self, "scale", ("weight", "one_plus_weight", "none"))
        _check_positive(self, "eps")
        if self.kind == "rmsnorm" and self.bias:
            raise ValueError("NormConfig: an rmsnorm has no bias; set bias=False")
        if self.scale == "none" and self.bias:
            raise ValueError("NormConfig: scale='none' learns nothing; set bias=False")


@dataclass(frozen=True)
class LinearScaling:
    """Rope positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("linear",))
        _check_positive(self, "factor")


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: only wavelengths that are long against `original_block_size` are stretched.

    Those above `original_block_size / low_freq_factor` by `factor`, those below
    `original_block_size / high_freq_factor` not, those between by a mean of the two.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_block_size: int
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("llama3",))
        _check_positive(self, "factor", "low_freq_factor", "high_freq_factor")
        _check_positive_int("Llama3Scaling", "original_block_size", self.original_block_size)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"Llama3Scaling: high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071).

    Dimensions that turn less than `beta_slow` times in `original_block_size` positions are
    stretched by `factor`, those that turn more than `beta_fast` times are not, with a ramp
    between; `truncate` rounds the ends of the ramp to whole dimensions. Queries and keys are
    multiplied by `attention_factor`; None is the paper's 0.1 ln(factor) + 1.
    """

    factor: float
    original_block_size: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("yarn",))
        _check_positive(self, "factor", "attention_factor", "beta_fast", "beta_slow")
        _check_positive_int("YarnScaling", "original_block_size", self.original_block_size)
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"YarnScaling: beta_fast={self.beta_fast} must exceed beta_slow={self.beta_slow}"
            )


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
_SCALINGS = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}


@dataclass(frozen=True)
class PositionConfig:
    """How positions enter: a learned table added to the embedding, rotations of q and k, or not.

    - `offset`: of a learned table, rows before that of the first position (OPT's padding).
    - `rope_dim`: how many of a head's dimensions are rotated, the first ones; None is all.
    - `rope_pairs`: which two dimensions turn together: i and i + rope_dim/2 (Llama), or
      neighbours (GPT-J).
    """

    kind: Literal["learned", "rope", "none"] = "learned"
    offset: int = 0
    rope_theta: float = 10_000.0
    rope_dim: int | None = None
    rope_pairs: Literal["halves", "neighbours"] = "halves"
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("learned", "rope", "none"))
        _check_choice(self, "rope_pairs", ("halves", "neighbours"))
        _check_positive(self, "rope_theta")
        owner = {"offset": "learned", "rope_theta": "rope", "rope_dim": "rope"}
        owner |= {"rope_pairs": "rope", "rope_scaling": "rope"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            needed = owner.get(field.name, self.kind)
            if self.kind != needed and value != field.default:
                raise ValueError(f"PositionConfig: {field.name}={value!r} needs kind={needed!r}")
        if isinstance(self.offset, bool) or not isinstance(self.offset, int) or self.offset < 0:
            raise ValueError(f"PositionConfig: offset must be 0 or above, got {self.offset!r}")
        if self.rope_dim is not None:
            _check_positive_int("PositionConfig", "rope_dim", self.rope_dim)


@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head attention; fewer key-value heads than query heads make it grouped.

    - `n_kv_head` None is `n_head`; `head_dim` None is `n_embd // n_head`.
    - `qk_norm`: queries and keys are normalised, as `GPTConfig.norm` says, before they are
      rotated: each head by itself (Qwen3), or all heads together (OLMo 2).
    - `scale`: of the scores; None is `head_dim ** -0.5`.
    - `softcap`: scores become softcap * tanh(scores / softcap) (Gemma 2).
    - `clip_qkv`: queries, keys and values are cut off at that size (OLMo).
    """

    n_kv_head: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    scale: float | None = None
    softcap: float | None = None
    clip_qkv: float | None = None

    def __post_init__(self) -> None:
        _check_choice(self, "qk_norm", ("none", "head", "all_heads"))
        _check_positive(self, "scale", "softcap", "clip_qkv")


@dataclass(frozen=True)
class MLPConfig:
    """`plain`: down(act(up(x))).  `gated`: down(act(gate(x)) * up(x)) (arXiv:2002.05202).

    `n_inner` is the hidden width; None is `4 * n_embd`. `gelu` is exact, `gelu_tanh` is
    GPT-2's, `relu2` is relu squared (arXiv:2109.08668).
    """

    kind: Literal["plain", "gated"] = "plain"
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"] = "gelu_tanh"
    n_inner: int | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("plain", "gated"))
        _check_choice(self, "activation", ("gelu", "gelu_tanh", "relu", "relu2", "silu"))


@dataclass(frozen=True)
class LayerConfig:
    """What one layer does otherwise than the rest.

    - `window`: how many positions it sees, its own among them (arXiv:2004.05150); None is all.
    - `position`: its rope or none, instead of the model's.
    """

    window: int | None = None
    position: PositionConfig | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            _check_positive_int("LayerConfig", "window", self.window)
        if self.position is not None and self.position.kind == "learned":
            raise ValueError(
                "LayerConfig: a learned table belongs to the whole model; set GPTConfig.position"
            )


@dataclass(frozen=True)
class GPTConfig:
    """A decoder-only transformer. The default is GPT-2 124M.

    **Fields:**

    - `block_size`: the longest sequence, in tokens.
    - `vocab_size`: rows of the token embedding.
    - `n_token`: how many of those rows are real tokens; the rest pad the table to a size that
      runs well, are never sampled and never exported. None: all of them.
    - `head`: `tied` shares the token embedding with the output, `untied` learns its own.
    - `head_bias`: an untied head has a bias.
    - `logit_softcap`: logits become logit_softcap * tanh(logits / logit_softcap) (Gemma 2).
    - `embedding_scale`: what the token embeddings are multiplied by.
    - `residual`: how a block's branches, attention and mlp, meet the residual stream.
      `pre_norm`: each takes the normalised stream (GPT-2). `post_norm`: each one's output is
      normalised (OLMo 2). `sandwich`: both (Gemma 2). `parallel`: both take the same stream,
      each with its norm (GPT-NeoX). `parallel_shared_norm`: with one norm (GPT-J).
    - `layers`: the kinds of layers, repeated in this order: layer i is `layers[i % len(layers)]`.
    - `dropout`: probability, of embeddings, attention weights and both residual branches.
    - `attention_dropout`: that of attention weights alone; None is `dropout`.
    - `unroll`: blocks per iteration of the scan over layers; 1 compiles fastest.
    - `remat`: what the backward pass computes again instead of finding it kept: nothing, all of
      a block but its input (`block`), or all but the results of its linear maps (`dots`).
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    attention_dropout: float | None = None
    n_token: int | None = None
    head: Literal["tied", "untied"] = "tied"
    head_bias: bool = False
    logit_softcap: float | None = None
    embedding_scale: Literal["one", "sqrt_n_embd"] = "one"
    residual: Literal["pre_norm", "post_norm", "sandwich", "parallel", "parallel_shared_norm"] = (
        "pre_norm"
    )
    norm: NormConfig = NormConfig()
    position: PositionConfig = PositionConfig()
    attention: AttentionConfig = AttentionConfig()
    mlp: MLPConfig = MLPConfig()
    layers: tuple[LayerConfig, ...] = (LayerConfig(),)
    unroll: int = 1
    remat: Literal["none", "block", "dots"] = "none"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "unroll"):
            _check_positive_int("GPTConfig", name, getattr(self, name))
        if self.attention.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                "change one of them, or give attention.head_dim"
            )
        for name in ("n_kv_head", "head_dim", "real_vocab_size", "n_inner"):
            _check_positive_int("GPTConfig", name, getattr(self, name))
        _check_choice(self, "head", ("tied", "untied"))
        _check_choice(self, "embedding_scale", ("one", "sqrt_n_embd"))
        _check_choice(self, "residual", RESIDUALS)
        _check_choice(self, "remat", ("none", "block", "dots"))
        _check_positive(self, "logit_softcap")
        for name in ("dropout", "attention_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"GPTConfig: {name} must be in [0, 1), got {rate}")
        if self.head == "tied" and self.head_bias:
            raise ValueError("GPTConfig: head_bias needs head='untied'")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"GPTConfig: n_head={self.n_head} is not a multiple of "
                f"attention.n_kv_head={self.n_kv_head}"
            )
        if self.real_vocab_size > self.vocab_size:
            raise ValueError(
                f"GPTConfig: n_token={self.n_token} exceeds vocab_size={self.vocab_size}"
            )
        if not 1 <= len(self.layers) <= self.n_layer:
            raise ValueError(
                f"GPTConfig: layers names {len(self.layers)} kinds for n_layer={self.n_layer}"
            )
        for i in range(len(self.layers)):
            position = self.layer_position(i)
            rotated = self.head_dim if position.rope_dim is None else position.rope_dim
            if position.kind == "rope" and (rotated % 2 or rotated > self.head_dim):
                raise ValueError(
                    f"GPTConfig: rope turns pairs among the head_dim={self.head_dim} dimensions "
                    f"of a head, not {rotated}; give an even rope_dim of at most that"
                )

    @property
    def n_kv_head(self) -> int:
        return self.n_head if self.attention.n_kv_head is None else self.attention.n_kv_head

    @property
    def head_dim(self) -> int:
        given = self.attention.head_dim
        return self.n_embd // self.n_head if given is None else given

    @property
    def n_inner(self) -> int:
        return 4 * self.n_embd if self.mlp.n_inner is None else self.mlp.n_inner

    @property
    def real_vocab_size(self) -> int:
        """Tokens that can occur: `vocab_size` less the padding rows."""
        return self.vocab_size if self.n_token is None else self.n_token

    @property
    def weights_dropout(self) -> float:
        """Of attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    def layer_position(self, layer: int) -> PositionConfig:
        """How positions enter the layer."""
        own = self.layers[layer % len(self.layers)].position
        return self.position if own is None else own

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, for JSON."""
        return {**dataclasses.asdict(self), "layers": [dataclasses.asdict(x) for x in self.layers]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "GPTConfig":
        """The inverse of `to_dict`. An unknown field is a ValueError that names it."""
        return _from_dict(GPTConfig, values)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters of linear maps (Hu et al. 2021, arXiv:2106.09685).

    `targets` are patterns over the names of the maps, such as `blocks.attention.*,blocks.mlp.up`
    (`eqx_gpt.tree.matching`). What an adapter adds is multiplied by `alpha / rank`.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "blocks.*"

    def __post_init__(self) -> None:
        _check_positive_int("LoRAConfig", "rank", self.rank)
        _check_positive(self, "alpha")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "LoRAConfig":
        """The inverse of `dataclasses.asdict`. An unknown field is a ValueError that names it."""
        return _from_dict(LoRAConfig, values)


RESIDUALS = ("pre_norm", "post_norm", "sandwich", "parallel", "parallel_shared_norm")
_PARTS: dict[str, type] = {
    "norm": NormConfig,
    "position": PositionConfig,
    "attention": AttentionConfig,
    "mlp": MLPConfig,
}


def _from_dict(cls: type, values: Any) -> Any:
    return cls(**{k: _part(k, v) for k, v in _known_fields(cls, values).items()})


def _part(name: str, value: Any) -> Any:
    """The config of a field of some config, or the value itself if it is none."""
    if name == "layers":
        if not isinstance(value, list | tuple):
            raise ValueError(f"GPTConfig: layers must be a list, got {value!r}")
        return tuple(_from_dict(LayerConfig, layer) for layer in value)
    if name == "rope_scaling" and value is not None:
        kind = value.get("kind") if isinstance(value, Mapping) else value
        if not isinstance(kind, str) or kind not in _SCALINGS:
            raise ValueError(
                f"PositionConfig: unknown rope_scaling {kind!r}; {', '.join(_SCALINGS)}"
            )
        return _from_dict(_SCALINGS[kind], value)
    return _from_dict(_PARTS[name], value) if name in _PARTS and value is not None else value
