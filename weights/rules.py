"""The key map: how the leaves of a model lie in the tensors of a Hugging Face file.

One rule ties one leaf (a dotted name of `eqx_gpt.tree.named_arrays`) to the keys that hold it.
`rule.views(leaf)` gives, for each key, the part of the leaf's memory that the key's tensor is, in
the order of the tensor: saving reads the views, and their shapes are the shapes to expect.
`rule.reads` says the same of any box of the leaf, for loading.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Op = Literal["same", "transpose", "fuse", "interleave"]
LAYER = "{layer}"


@dataclass(frozen=True)
class Rule:
    """One leaf of the model, and the templates of the keys that hold it.

    A template with `{layer}` names one key a layer, and the leaf stacks them on its axis 0.

    - `same`: one key, the tensor is the leaf.
    - `transpose`: one key, the tensor is the leaf with its two axes exchanged.
    - `fuse`: several keys, of `rows` each; the leaf is their concatenation along axis 0.
    - `interleave`: one key. `rows` is (parts, heads): the rows of the leaf are all heads of the
      first part, then of the next; those of the tensor are all parts of the first head, then of
      the next.
    """

    leaf: str
    keys: tuple[str, ...]
    op: Op = "same"
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.op == "fuse" and len(self.keys) != len(self.rows):
            raise ValueError(f"Rule {self.leaf}: fuse needs as many rows as keys")
        if self.op != "fuse" and len(self.keys) != 1:
            raise ValueError(f"Rule {self.leaf}: {self.op} needs one key")
        if len(self.rows) != {"fuse": len(self.keys), "interleave": 2}.get(self.op, 0):
            raise ValueError(f"Rule {self.leaf}: {self.op} does not take rows={self.rows}")
        if len({LAYER in key for key in self.keys}) != 1:
            raise ValueError(f"Rule {self.leaf}: all of the keys are stacked, or none")

    @property
    def stacked(self) -> bool:
        return LAYER in self.keys[0]

    def views(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Each key, and the view of `leaf` that is its tensor.

        The numbers of the view are the tensor's in the tensor's order; an `interleave` view has
        the first axis of the tensor as three.
        """
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
            case "interleave":
                n_part, n_head = self.rows
                if leaf.shape[0] % (n_part * n_head):
                    raise ValueError(f"Rule {self.leaf}: {self.rows} heads for {leaf.shape}")
                parts = [leaf.reshape(n_part, n_head, -1, *leaf.shape[1:]).swapaxes(0, 1)]
        for key, part in zip(self.keys, parts, strict=True):
            yield key.replace(LAYER, layer), part

    def reads(
        self, part: np.ndarray, box: Sequence[range], n_rows: int
    ) -> Iterator[tuple[str, np.ndarray, tuple[slice, ...]]]:
        """What fills a part of the leaf: a key, where in the part it goes, a box of its tensor.

        **Arguments:**

        - `part`: the memory to fill, of the shape of `box`.
        - `box`: which indices of each axis of the leaf the part is.
        - `n_rows`: of the whole leaf; of one layer, if it is stacked.

        **Yields:** the key, a view of `part`, and the box of the tensor, of the shape of the view.
        """
        if not self.stacked:
            yield from self._reads_of_one(part, box, n_rows, "")
        else:
            for i, layer in enumerate(box[0]):
                yield from self._reads_of_one(part[i], box[1:], n_rows, str(layer))

    def _reads_of_one(
        self, part: np.ndarray, box: Sequence[range], n_rows: int, layer: str
    ) -> Iterator[tuple[str, np.ndarray, tuple[slice, ...]]]:
        rows, *others = (slice(indices.start, indices.stop) for indices in box)
        for key, there, here, count in self._strips(n_rows):
            start, stop = max(here, rows.start), min(here + count, rows.stop)
            if start >= stop:
                continue
            view = part[start - rows.start : stop - rows.start]
            theirs = slice(start - here + there, stop - here + there)
            if self.op == "transpose":
                yield key.replace(LAYER, layer), view.T, (*others, theirs)
            else:
                yield key.replace(LAYER, layer), view, (theirs, *others)

    def _strips(self, n_rows: int) -> Iterator[tuple[str, int, int, int]]:
        """Rows that lie together in a tensor and in the leaf: the key, the first one in the
        tensor, the first one in the leaf, and how many."""
        match self.op:
            case "fuse":
                first = itertools.accumulate(self.rows, initial=0)
                for key, here, count in zip(self.keys, first, self.rows, strict=False):
                    yield key, 0, here, count
            case "interleave":
                n_part, n_head = self.rows
                count = n_rows // (n_part * n_head)
                for head, p in itertools.product(range(n_head), range(n_part)):
                    there, here = head * n_part + p, p * n_head + head
                    yield self.keys[0], there * count, here * count, count
            case _:
                yield self.keys[0], 0, 0, n_rows


def linear(
    leaf: str,
    *keys: str,
    bias: bool,
    op: Op = "same",
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
    """All that the files of a model may hold.

    - `rules`: one for each leaf but the embedding and the head's weight.
    - `embedding`, `head`: the keys of the token embedding and of the head's weight.
    - `prefix`: what the keys of the whole model begin with, all but the head's; files of the
      model without its head lack it.
    - `ignored`: templates of keys that hold no weights, such as a causal mask.
    """

    rules: tuple[Rule, ...]
    embedding: str
    prefix: str
    ignored: tuple[str, ...] = ()
    head: str = "lm_head.weight"

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
            self.head,
        )

    def all_rules(self, head: Literal["tied", "untied"]) -> list[Rule]:
        rules = [Rule("wte.weight", (self.embedding,)), *self.rules]
        return rules if head == "tied" else [*rules, Rule("head.weight", (self.head,))]


def key_shapes(rule: Rule, leaf_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of each key's tensor. Allocates nothing."""
    leaf = np.broadcast_to(np.float32(0), leaf_shape)
    return {key: tensor_shape(rule, view) for key, view in rule.views(leaf)}


def tensor_shape(rule: Rule, view: np.ndarray) -> tuple[int, ...]:
    """The shape of the tensor that a view of `rule.views` holds."""
    if rule.op != "interleave":
        return view.shape
    return (math.prod(view.shape[:3]), *view.shape[3:])
