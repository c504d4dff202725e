"""The loss on fixed data: some batches during a run, or every token of a split."""

import operator
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int32, Shaped

from eqx_gpt.gpt import GPT
from train.data import Windows
from train.packing import PackedWindows, micro_batches, n_learnt
from train.step import eval_step

Progress = Callable[[int, int], None]


def sampled_loss(
    model: GPT,
    windows: Windows | PackedWindows,
    *,
    batch_size: int,
    n_batch: int,
    micro_batch_size: int,
    dtype: DTypeLike,
    progress: Progress,
) -> float:
    """Mean loss, in nats a token learnt, of the first `n_batch` batches of `windows`.

    They are fewer if the split ends before. `progress(done, total)` is called after each
    micro-batch and may raise to end the evaluation.
    """
    n_batch = max(1, min(n_batch, windows.per_epoch // batch_size))
    n_micro = batch_size // micro_batch_size
    losses, counts = [], []
    for i in range(n_batch):
        batch = windows.batch(i, batch_size)
        parts = jax.tree.map(jnp.asarray, micro_batches(batch, n_micro))
        of_batch = []
        for j in range(n_micro):
            micro = jax.tree.map(operator.itemgetter(j), parts)
            of_batch.append(float(eval_step(model, micro, dtype)))
            progress(i * n_micro + j + 1, n_batch * n_micro)
        losses.append(np.mean(of_batch))
        counts.append(n_learnt(batch))
    return float(np.average(losses, weights=counts))


def answers_loss(
    model: GPT,
    windows: PackedWindows,
    *,
    micro_batch_size: int,
    dtype: DTypeLike,
    progress: Progress,
) -> tuple[float, int]:
    """Mean loss over every token that is learnt of a packed split, and how many those are."""
    total, count = 0.0, 0
    for first in range(0, windows.per_epoch, micro_batch_size):
        part = windows.samples(first, min(micro_batch_size, windows.per_epoch - first))
        n = n_learnt(part)
        total += n * float(eval_step(model, jax.tree.map(jnp.asarray, part), dtype))
        count += n
        progress(first + len(part.tokens), windows.per_epoch)
    return total / count, count


def split_loss(
    model: GPT,
    tokens: Shaped[np.ndarray, " tokens"],
    *,
    block_size: int,
    micro_batch_size: int,
    dtype: DTypeLike,
    progress: Progress,
) -> tuple[float, int]:
    """Mean loss over every token of a split but its first, and how many those are.

    The split is cut into consecutive blocks; a token is predicted from those before it in its
    block, so the context is `block_size / 2` on average. The last block is shorter.

    **Raises:** ValueError if the model has no room for such a block.
    """
    longest = model.config.block_size
    if not 1 <= block_size <= longest:
        raise ValueError(f"block_size={block_size} is outside 1 to the model's {longest}")
    total, count = 0.0, 0
    n_predicted = len(tokens) - 1
    for windows in _consecutive(tokens, block_size, micro_batch_size):
        n = windows.shape[0] * (windows.shape[1] - 1)
        total += n * float(eval_step(model, jnp.asarray(windows), dtype))
        count += n
        progress(count, n_predicted)
    return total / count, count


def _consecutive(
    tokens: Shaped[np.ndarray, " tokens"], block_size: int, rows: int
) -> Iterator[Int32[np.ndarray, "micro seq_plus_1"]]:
    """Every block as a window with one token more, the target of its last."""
    n_block = (len(tokens) - 1) // block_size
    for first in range(0, n_block, rows):
        starts = np.arange(first, min(first + rows, n_block)) * block_size
        index = starts[:, None] + np.arange(block_size + 1)[None, :]
        yield tokens[index].astype(np.int32)
    rest = tokens[n_block * block_size :]
    if len(rest) > 1:
        yield rest[None, :].astype(np.int32)
