"""Which tokens a step trains on: a pure function of (seed, step, batch size).

There is no loader state, so a run resumes on exactly the data it would have seen.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped, UInt64

T = TypeVar("T")


@dataclass(frozen=True)
class Windows:
    """Windows of block_size + 1 tokens, drawn without replacement within an epoch.

    An epoch cuts the tokens into consecutive windows from an offset of its own, so that over
    the epochs a token is met at every position, and takes them in an order of its own.
    """

    tokens: Shaped[np.ndarray, " tokens"]
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.block_size:
            raise ValueError(
                f"a split of {len(self.tokens):,} tokens is too short for one window of "
                f"block_size={self.block_size} and its target; use a smaller --block_size or "
                "more data"
            )

    @property
    def per_epoch(self) -> int:
        """Windows in an epoch, whatever its offset."""
        return max(1, (len(self.tokens) - self.block_size) // self.block_size)

    def n_learnt(self, first: int, n: int) -> int:
        """How many tokens are learnt of the windows `first` to `first + n` of a run: all."""
        return n * self.block_size

    def batch(
        self, step: int, batch_size: int, rows: range | None = None
    ) -> Int32[np.ndarray, "batch seq_plus_1"]:
        """The inputs of a step and, one token further, its targets; of all its rows or some."""
        slack = len(self.tokens) - self.per_epoch * self.block_size
        rows = range(batch_size) if rows is None else rows
        starts = np.empty(len(rows), np.int64)
        first = step * batch_size + rows.start
        for drawn_rows, order, key in drawn(first, len(rows), self.per_epoch, self.seed):
            offset = int(_mix(key, np.array([0], np.uint64))[0]) % min(slack, self.block_size)
            starts[drawn_rows] = offset + order * self.block_size
        index = starts[:, None] + np.arange(self.block_size + 1)[None, :]
        return self.tokens[index].astype(np.int32)


def drawn(
    first: int, n: int, per_epoch: int, seed: int
) -> Iterator[tuple[Bool[np.ndarray, " n"], Int64[np.ndarray, " rows"], UInt64[np.ndarray, "1"]]]:
    """The samples `first` to `first + n` of a run, by epoch: which are of it, their windows,
    from 0 to `per_epoch` - 1, and the epoch's key."""
    samples = np.arange(n, dtype=np.int64) + first
    epochs, within = np.divmod(samples, per_epoch)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        key = _mix(np.array([seed], np.uint64), np.array([epoch], np.uint64))
        yield rows, permute(within[rows].astype(np.uint64), per_epoch, key).astype(np.int64), key


def permute(
    index: UInt64[np.ndarray, " n"], size: int, key: UInt64[np.ndarray, "1"]
) -> UInt64[np.ndarray, " n"]:
    """Where `index` goes in a keyed permutation of 0 ... size - 1, computed point by point.

    A Feistel network (Luby and Rackoff 1988) permutes the next power of four; a result outside
    is sent through again until it lies inside ("cycle walking", Black and Rogaway 2002). Memory
    does not grow with `size`.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    result = index.copy()
    outside = np.ones(index.shape, bool)
    while outside.any():
        high, low = result[outside] >> half_bits, result[outside] & mask
        for round_number in range(6):
            round_key = _mix(key, np.array([round_number + 1], np.uint64))
            high, low = low, high ^ (_mix(round_key, low) & mask)
        result[outside] = (high << half_bits) | low
        outside = result >= np.uint64(size)
    return result


def _mix(key: UInt64[np.ndarray, "1"], x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """A keyed hash of 64 bits: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key * np.uint64(0xD1342543DE82EF95)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@contextmanager
def prefetched(make: Callable[[int], T], start: int, stop: int) -> Iterator[Iterator[T]]:
    """make(start), ..., make(stop - 1), made two ahead in a thread; its errors come out here."""
    results: queue.Queue[T | BaseException] = queue.Queue(maxsize=2)
    ended = threading.Event()

    def put(item: T | BaseException) -> None:
        while not ended.is_set():
            try:
                return results.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for i in range(start, stop):
                if ended.is_set():
                    return
                put(make(i))
        except BaseException as error:
            put(error)

    def take() -> Iterator[T]:
        for _ in range(start, stop):
            item = results.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        ended.set()
        thread.join()
