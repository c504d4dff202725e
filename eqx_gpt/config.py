"""Frozen configurations of a model. Nothing here imports jax.

A `GPTConfig` says what a model is, in the words of nanoGPT; its four sub-configs say how the
generic block (`layers/block.py`) is made. The defaults are GPT-2's. Combinations that mean
nothing are refused when the config is built.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence about an unknown `name`: the near names, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"


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


def _check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"GPTConfig: {name} must be a whole number above 0, got {value!r}")


@dataclass(frozen=True)
class NormConfig:
    """Layer norm (Ba et al. 2016, arXiv:1607.06450) or RMS norm (arXiv:1910.07467)."""

    kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("layernorm", "rmsnorm"))
        if self.kind == "rmsnorm" and self.bias:
            raise ValueError("NormConfig: an rmsnorm has no bias; set bias=False")
        if not self.eps > 0:
            raise ValueError(f"NormConfig: eps must be positive, got {self.eps}")


@dataclass(frozen=True)
class PositionConfig:
    """How positions enter: a learned table added to the embedding, or rotations of q and k."""

    kind: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("learned", "rope"))
        if self.kind != "rope" and self.rope_theta != 10_000.0:
            raise ValueError(f"PositionConfig: rope_theta={self.rope_theta} needs kind='rope'")


@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head attention; fewer key-value heads than query heads make it grouped.

    `n_kv_head` None is `n_head`; `head_dim` None is `n_embd // n_head`.
    """

    n_kv_head: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True


@dataclass(frozen=True)
class MLPConfig:
    """`plain`: down(act(up(x))).  `gated`: down(act(gate(x)) * up(x)) (arXiv:2002.05202).

    `n_inner` is the hidden width; None is `4 * n_embd`. `gelu` is exact, `gelu_tanh` is GPT-2's.
    """

    kind: Literal["plain", "gated"] = "plain"
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu_tanh"
    n_inner: int | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("plain", "gated"))
        _check_choice(self, "activation", ("gelu", "gelu_tanh", "relu", "silu"))


@dataclass(frozen=True)
class GPTConfig:
    """A decoder-only transformer. The default is GPT-2 124M.

    **Fields:**

    - `block_size`: the longest sequence, in tokens.
    - `vocab_size`: rows of the token embedding.
    - `n_token`: how many of those rows are real tokens; the rest pad the table to a size that
      runs well, are never sampled and never exported. None: all of them.
    - `head`: `tied` shares the token embedding with the output, `untied` learns its own.
    - `dropout`: probability, of embeddings, attention weights and both residual branches.
    - `unroll`: blocks per iteration of the scan over layers; 1 compiles fastest.
    - `remat`: `block` keeps only each block's input for the backward pass and computes the rest
      again.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    n_token: int | None = None
    head: Literal["tied", "untied"] = "tied"
    norm: NormConfig = NormConfig()
    position: PositionConfig = PositionConfig()
    attention: AttentionConfig = AttentionConfig()
    mlp: MLPConfig = MLPConfig()
    unroll: int = 1
    remat: Literal["none", "block"] = "none"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "unroll"):
            _check_positive_int(name, getattr(self, name))
        if self.attention.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                "change one of them, or give attention.head_dim"
            )
        for name in ("n_kv_head", "head_dim", "real_vocab_size", "n_inner"):
            _check_positive_int(name, getattr(self, name))
        _check_choice(self, "head", ("tied", "untied"))
        _check_choice(self, "remat", ("none", "block"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout must be in [0, 1), got {self.dropout}")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"GPTConfig: n_head={self.n_head} is not a multiple of "
                f"attention.n_kv_head={self.n_kv_head}"
            )
        if self.position.kind == "rope" and self.head_dim % 2:
            raise ValueError(f"GPTConfig: rope needs an even head_dim, got {self.head_dim}")
        if self.real_vocab_size > self.vocab_size:
            raise ValueError(
                f"GPTConfig: n_token={self.n_token} exceeds vocab_size={self.vocab_size}"
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

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "GPTConfig":
        """The inverse of `to_dict`. An unknown field is a ValueError that names it."""
        parts = {
            "norm": NormConfig,
            "position": PositionConfig,
            "attention": AttentionConfig,
            "mlp": MLPConfig,
        }
        values = _known_fields(GPTConfig, values)
        return GPTConfig(
            **{k: parts[k](**_known_fields(parts[k], v)) if k in parts else v
               for k, v in values.items()}
        )  # fmt: skip
