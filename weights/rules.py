"""The key map: how the leaves of a model lie in the tensors of a Hugging Face file.

One rule ties one leaf (a dotted name of `eqx_gpt.tree.named_arrays`) to the keys that hold it.
A rule is a numpy view: `rule.views(leaf)` gives, for each key, the part of the leaf's memory that
the key's tensor is, in the tensor's own shape. Loading assigns to the views, saving reads them,
and their shapes are the shapes to expect, so that no direction can disagree with another.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

LAYER = "{layer}"
HEAD_KEY = "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One leaf of the model, and the templates of the keys that hold it.

    A template with `{layer}` names one key a layer, and the leaf stacks them on its axis 0.

    - `same`: one key, the tensor is the leaf.
    - `transpose`: one key, the tensor is the leaf with its two axes exchanged.
    - `fuse`: several keys, of `rows` each; the leaf is their concatenation along axis 0.
    """

    leaf: str
    keys: tuple[str, ...]
    op: Literal["same", "transpose", "fuse"] = "same"
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.op == "fuse" and len(self.keys) != len(self.rows):
            raise ValueError(f"Rule {self.leaf}: fuse needs as many rows as keys")
        if self.op != "fuse" and (len(self.keys) != 1 or self.rows):
            raise ValueError(f"Rule {self.leaf}: {self.op} needs one key and no rows")
        if len({LAYER in key for key in self.keys}) != 1:
            raise ValueError(f"Rule {self.leaf}: all of the keys are stacked, or none")

    @property
    def stacked(self) -> bool:
        return LAYER in self.keys[0]

    def views(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Each key, and the view of `leaf` that is its tensor."""
        if not self.stacked:
            yield from self._views_of_one(leaf, "")
        else:
            for layer in range(leaf.shape[0]):
                yield from self._views_of_one(leaf[layer], str(layer))

    def _views_of_one(self, leaf: np.ndarray, layer: str) -> Iterator[tuple[str, np.ndarray]]:
        match self.op:
            case "same":
                parts = [leaf]
            case "transpose":
                parts = [leaf.T]
            case "fuse":
                if sum(self.rows) != leaf.shape[0]:
                    raise ValueError(f"Rule {self.leaf}: {self.rows} rows for {leaf.shape}")
                parts = np.split(leaf, np.cumsum(self.rows)[:-1])
        for key, part in zip(self.keys, parts, strict=True):
            yield key.replace(LAYER, layer), part


def linear(
    leaf: str,
    *keys: str,
    bias: bool,
    op: Literal["same", "transpose", "fuse"] = "same",
    rows: tuple[int, ...] = (),
) -> list[Rule]:
    """The rules of a linear map's weight, and of its bias if it has one."""
    weight = Rule(f"{leaf}.weight", tuple(f"{key}.weight" for key in keys), op, rows)
    if not bias:
        return [weight]
    bias_op = "same" if op == "transpose" else op
    return [weight, Rule(f"{leaf}.bias", tuple(f"{key}.bias" for key in keys), bias_op, rows)]


@dataclass(frozen=True)
class KeyMap:
    """All that the files of a model may hold. Every family names the head `lm_head.weight`.

    - `rules`: one for each leaf but the embedding and the head.
    - `embedding`: the key of the token embedding.
    - `prefix`: what the keys of the whole model begin with, all but the head's; files of the
      model without its head lack it.
    - `ignored`: templates of keys that hold no weights, such as a causal mask.
    """

    rules: tuple[Rule, ...]
    embedding: str
    prefix: str
    ignored: tuple[str, ...]

    def as_in(self, keys: Iterable[str]) -> "KeyMap":
        """This map with the prefix, or without if no key of the files has it."""
        if any(key.startswith(self.prefix) for key in keys):
            return self

        def strip(key: str) -> str:
            return key.removeprefix(self.prefix)

        return KeyMap(
            tuple(dataclasses.replace(r, keys=tuple(map(strip, r.keys))) for r in self.rules),
            strip(self.embedding),
            self.prefix,
            tuple(map(strip, self.ignored)),
        )

    def all_rules(self, head: Literal["tied", "untied"]) -> list[Rule]:
        rules = [Rule("wte.weight", (self.embedding,)), *self.rules]
        return rules if head == "tied" else [*rules, Rule("head.weight", (HEAD_KEY,))]


def key_shapes(rule: Rule, leaf_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of each key's tensor. Allocates nothing."""
    leaf = np.broadcast_to(np.float32(0), leaf_shape)
    return {key: view.shape for key, view in rule.views(leaf)}
