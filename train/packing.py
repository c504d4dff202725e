"""Whole documents packed into windows, of which some tokens are learnt.

A window holds as many documents as fit, one after the other; none sees another, and the positions
of each count from its beginning. Where documents are much shorter than a window, as conversations
are, this wastes next to nothing, and cuts none that fits.
"""

import bisect
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Int64, PyTree, Shaped, UInt8

from train.data import Windows, drawn
from train.manifest import BEGINS, LEARNT, Manifest, SplitName


class Packed(NamedTuple):
    """A batch of windows, a PyTree.

    - `tokens`: the inputs and, one further, the targets.
    - `weights`: of each target in the loss, which is the mean of weight times loss over all of
      them. None is 1 for all.
    - `starts`: where in its window the document of each input begins. None is at 0 for all.
    """

    tokens: Int[Any, "*batch seq_plus_1"]  # of NumPy, and then of jax
    weights: Float[Any, "*batch seq"] | None = None
    starts: Int[Any, "*batch seq"] | None = None


@dataclass(frozen=True)
class PackedWindows:
    """Windows of whole documents, drawn without replacement within an epoch.

    Which documents share a window is the same in every epoch; the order of the windows is not. A
    document longer than a window loses its end, and one of which no token is learnt within a
    window is left out.
    """

    tokens: Shaped[np.ndarray, " tokens"]
    flags: UInt8[np.ndarray, " tokens"]
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.per_epoch:
            raise ValueError(
                f"no document of the split has a token to learn among its first {self.block_size} "
                "+ 1; use a larger --block_size"
            )

    @cached_property
    def documents(self) -> tuple[Int64[np.ndarray, " documents"], Int64[np.ndarray, " documents"]]:
        """Where those that are trained on begin, and their lengths within a window."""
        begins = np.flatnonzero(self.flags & BEGINS)
        lengths = np.minimum(np.diff(begins, append=len(self.flags)), self.block_size + 1)
        edges = np.stack([begins, begins + lengths], axis=1).reshape(-1)
        kept = np.logical_or.reduceat(np.append(self.flags & LEARNT, np.uint8(0)), edges)[::2]
        return begins[kept], lengths[kept]

    @cached_property
    def _windows(self) -> list[list[int]]:
        return best_fit(self.documents[1], self.block_size + 1)

    @property
    def n_cut(self) -> int:
        """Documents that lose their end, or are left out."""
        begins = np.flatnonzero(self.flags & BEGINS)
        too_long = np.diff(begins, append=len(self.flags)) > self.block_size + 1
        return int(np.sum(too_long))

    @property
    def per_epoch(self) -> int:
        return len(self._windows)

    @cached_property
    def _learnt(self) -> Int64[np.ndarray, " windows"]:
        """How many tokens of each window are learnt."""
        begins, lengths = self.documents
        edges = np.stack([begins, begins + lengths], axis=1).reshape(-1)
        learnt = np.append((self.flags & LEARNT) > 0, False)
        of_document = np.add.reduceat(learnt, edges, dtype=np.int64)[::2]
        return np.array([of_document[window].sum() for window in self._windows])

    def n_learnt(self, first: int, n: int) -> int:
        """How many tokens are learnt of the windows `first` to `first + n` of a run."""
        return sum(
            int(self._learnt[order].sum())
            for _, order, _ in drawn(first, n, self.per_epoch, self.seed)
        )

    def batch(self, step: int, batch_size: int, rows: range | None = None) -> Packed:
        """The windows of a step, all or some."""
        first = step * batch_size
        if rows is None:
            return self.samples(first, batch_size)
        n_learnt = self.n_learnt(first, batch_size)
        return self.samples(first + rows.start, len(rows), of=(batch_size, n_learnt))

    def samples(self, first: int, n: int, of: tuple[int, int] | None = None) -> Packed:
        """The windows `first` to `first + n` of a run.

        Their weights are equal for the tokens that are learnt, and 1 on average over all: the mean
        over all tokens, in however many equal parts, is that over the tokens learnt. Where these
        windows are part of more, `of` is how many, and of how many tokens that are learnt.
        """
        shape = (n, self.block_size + 1)
        tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        starts = np.zeros(shape, np.int32)
        begins, lengths = self.documents
        for rows, order, _ in drawn(first, n, self.per_epoch, self.seed):
            for row, window in zip(np.flatnonzero(rows), order, strict=True):
                at = 0
                for document in self._windows[window]:
                    begin, length = begins[document], lengths[document]
                    here, there = slice(at, at + length), slice(begin, begin + length)
                    tokens[row, here] = self.tokens[there]
                    weights[row, here] = (self.flags[there] & LEARNT) > 0
                    starts[row, here] = at
                    at += length
                starts[row, at:] = at  # padding sees itself
        # No first token of a document is learnt, so no target is another document's.
        weights, starts = weights[:, 1:], starts[:, :-1]
        n_window, n_learnt = (n, weights.sum(dtype=np.float32)) if of is None else of
        mean = n_window * self.block_size / np.float32(n_learnt)
        return Packed(tokens, weights * mean, starts)


def windows_of(
    data: Manifest, split: SplitName, block_size: int, seed: int
) -> Windows | PackedWindows:
    """The windows that a dataset is trained on or evaluated in."""
    flags = data.flags(split)
    if flags is None:
        return Windows(data.tokens(split), block_size, seed)
    return PackedWindows(data.tokens(split), flags, block_size, seed)


def describe_packing(windows: Windows | PackedWindows) -> str:
    """What a person should know of it, to end a sentence on the data."""
    if isinstance(windows, Windows):
        return ""
    n_cut, n_document = windows.n_cut, len(windows.documents[0])
    cut = f", {n_cut:,} too long for one and cut" if n_cut else ""
    return f"; {n_document:,} documents in {windows.per_epoch:,} windows{cut}; answers are learnt"


def best_fit(lengths: Int64[np.ndarray, " documents"], room: int) -> list[list[int]]:
    """Which documents go together, each no longer than `room`: the longest first, each where it
    leaves the least room (best-fit decreasing; for training, Ding et al. 2024, arXiv:2404.10830).
    """
    windows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> windows
    rooms: list[int] = []  # the keys of those, sorted
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            left = rooms[at]
            window = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[at]
            windows[window].append(document)
        else:
            left, window = room, len(windows)
            windows.append([document])
        left -= length
        if left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        with_room[left].append(window)
    return windows


def micro_batches(windows: PyTree[Any], n_micro: int) -> PyTree[Any]:
    """The windows of a batch, packed or not, in so many equal parts along a new leading axis."""
    return jax.tree.map(lambda x: x.reshape(n_micro, -1, *x.shape[1:]), windows)


def n_learnt(windows: Any) -> int:
    """How many tokens of a batch, packed or not, the loss is of."""
    if not isinstance(windows, Packed):
        return windows[..., 1:].size
    assert windows.weights is not None
    return int(np.count_nonzero(windows.weights))
