"""The order of the data, and its prefetching."""

import threading

import numpy as np
import pytest

from train.data import Windows, permute, prefetched


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 101, 1009, 4096])
def test_permute_is_a_permutation_for_every_size(size):
    key = np.array([size * 31], np.uint64)
    there = permute(np.arange(size, dtype=np.uint64), size, key)
    assert sorted(there.tolist()) == list(range(size))


def test_permute_depends_on_the_key_and_mixes():
    n = 10_007
    index = np.arange(n, dtype=np.uint64)
    a = permute(index, n, np.array([1], np.uint64)).astype(float)
    b = permute(index, n, np.array([2], np.uint64)).astype(float)
    for order in (a, b):
        assert abs(np.corrcoef(index.astype(float), order)[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_a_window_is_consecutive_tokens():
    windows = Windows(np.arange(1009, dtype=np.uint16), block_size=7, seed=3)
    batch = windows.batch(5, 11)
    assert batch.shape == (11, 8)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(np.diff(batch, axis=1), 1)


def test_an_epoch_draws_every_window_once_and_epochs_differ():
    windows = Windows(np.arange(1009, dtype=np.uint16), block_size=7, seed=3)
    n = windows.per_epoch
    assert n == (1009 - 7) // 7
    epochs = [windows.batch(epoch, n)[:, 0] for epoch in range(3)]
    for starts in epochs:
        assert len(set(starts.tolist())) == n
        assert len({start % 7 for start in starts.tolist()}) == 1  # consecutive, no overlap
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    assert len({int(epoch.min()) for epoch in epochs}) > 1  # each cut from an offset of its own


def test_order_is_the_same_however_it_is_cut_into_batches():
    windows = Windows(np.arange(1009, dtype=np.uint16), block_size=7, seed=3)
    by_six = np.concatenate([windows.batch(step, 6) for step in range(60)])
    by_ten = np.concatenate([windows.batch(step, 10) for step in range(36)])
    np.testing.assert_array_equal(by_six, by_ten)


def test_seed_decides_the_order():
    tokens = np.arange(1009, dtype=np.uint16)
    first = Windows(tokens, 7, seed=3).batch(0, 13)
    np.testing.assert_array_equal(first, Windows(tokens, 7, seed=3).batch(0, 13))
    assert not np.array_equal(first, Windows(tokens, 7, seed=4).batch(0, 13))


@pytest.mark.parametrize("length", [8, 9, 13, 14, 15])
def test_short_splits_stay_inside(length):
    windows = Windows(np.arange(length, dtype=np.uint16), block_size=7, seed=1)
    batch = np.concatenate([windows.batch(step, 5) for step in range(20)])
    np.testing.assert_array_equal(np.diff(batch, axis=1), 1)
    assert batch.max() < length


def test_too_short_a_split_is_refused():
    with pytest.raises(ValueError, match=r"7 tokens is too short .* block_size=7"):
        Windows(np.arange(7, dtype=np.uint16), block_size=7, seed=1)


def test_prefetch_gives_all_in_order_and_stops_its_thread():
    with prefetched(lambda i: i * i, 3, 9) as squares:
        assert list(squares) == [9, 16, 25, 36, 49, 64]
    before = threading.active_count()
    with prefetched(lambda i: i, 0, 1_000_000) as numbers:
        assert next(numbers) == 0
    assert threading.active_count() == before


def test_prefetch_passes_errors_on():
    with (
        pytest.raises(ZeroDivisionError),
        prefetched(lambda i: 1 // (2 - i), 0, 5) as results,
    ):
        list(results)
