"""The loss on fixed data: some batches during a run, or every token of a split."""

import math
import operator
from collections.abc import Callable, Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int64, Shaped

from eqx_gpt.gpt import GPT
from eqx_gpt.ops.meshed import laid
from eqx_gpt.score import token_scores
from eqx_gpt.tree import cast
from train.data import Windows
from train.manifest import BEGINS, Manifest, SplitName
from train.mesh import batch_on, n_parts
from train.packing import PackedWindows, n_learnt
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
    mesh: Mesh | None = None,
) -> float:
    """Mean loss, in nats a token learnt, of the first `n_batch` batches of `windows`.

    They are fewer if the split ends before. `progress(done, total)` is called after each
    micro-batch and may raise to end the evaluation.
    """
    n_batch = max(1, min(n_batch, windows.per_epoch // batch_size))
    # As many as a mesh divides; where there is none such, one, which is filled.
    fitting = [n for n in range(1, batch_size + 1) if batch_size % (n * n_parts(mesh)) == 0]
    few = (n for n in fitting if n * micro_batch_size >= batch_size)
    n_micro = min(few, default=max(fitting, default=1))
    losses, counts = [], []
    for i in range(n_batch):
        parts = batch_on(mesh, windows, i, batch_size, n_micro)
        of_batch = []
        for j in range(n_micro):
            micro = jax.tree.map(operator.itemgetter(j), parts)
            of_batch.append(float(eval_step(model, micro, dtype)))
            progress(i * n_micro + j + 1, n_batch * n_micro)
        losses.append(np.mean(of_batch))
        counts.append(windows.n_learnt(i * batch_size, batch_size))
    return float(np.average(losses, weights=counts))


def answers_loss(
    model: GPT,
    windows: PackedWindows,
    *,
    micro_batch_size: int,
    dtype: DTypeLike,
    progress: Progress,
) -> tuple[float, int]:
    """Mean loss over every token that is learnt of a packed split, and how many those are.

    **Raises:** ValueError if the model has no room for such a window.
    """
    longest = model.config.block_size
    if not 1 <= windows.block_size <= longest:
        raise ValueError(f"block_size={windows.block_size} is outside 1 to the model's {longest}")
    if micro_batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {micro_batch_size}")
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
    stride: int | None = None,
    micro_batch_size: int,
    dtype: DTypeLike,
    progress: Progress,
) -> tuple[float, int]:
    """Mean loss, in nats, over every token of a split but its first, and how many those are.

    Each counts once. With `stride` None the split is cut into consecutive blocks: a token is
    predicted from those before it in its block, `block_size / 2` on average. Otherwise a window
    of `block_size` tokens moves on by `stride`, and only its last `stride` predictions count, but
    all of the first window's: each is made from more than `block_size - stride` tokens, where the
    split has so many before it, at `block_size / stride` times the cost. This is the sliding
    window of the perplexity guide in transformers' documentation, whose `max_length` is our
    `block_size + 1`, for the last token there predicts nothing.

    **Raises:** ValueError if the model has no room for such a block, if the stride is no part of
    one, or if there is no token to predict.
    """
    longest, n_target = model.config.block_size, len(tokens) - 1
    if not 1 <= block_size <= longest:
        raise ValueError(f"block_size={block_size} is outside 1 to the model's {longest}")
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"stride={stride} is outside 1 to block_size={block_size}; a longer one would skip "
            "tokens, and None cuts the split into consecutive blocks"
        )
    if n_target < 1:
        raise ValueError(f"a split of {len(tokens)} tokens has none to predict from another")
    if micro_batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {micro_batch_size}")
    computing = model if jnp.dtype(dtype) == jnp.float32 else cast(model, dtype)
    total, count = 0.0, 0
    for starts, n_counted in _windows(n_target, block_size, stride, micro_batch_size):
        at = starts[:, None] + np.arange(block_size + 1)[None, :]
        windows = tokens[np.minimum(at, n_target)].astype(np.int32)
        losses = np.asarray(_losses(computing, jnp.asarray(windows), n_counted))
        real = at[:, -n_counted:] <= n_target
        total += float(np.sum(losses[real], dtype=np.float64))
        count += int(np.sum(real))
        progress(count, n_target)
    return total / count, count


def block_size_for(model: GPT, data: Manifest, split: SplitName, asked: int | None) -> int:
    """The one asked for, or the model's; of conversations, which are packed, no more than the
    longest of them needs."""
    if asked is not None:
        return asked
    flags = data.flags(split)
    if flags is None:
        return model.config.block_size
    lengths = np.diff(np.flatnonzero(flags & BEGINS), append=len(flags))
    return min(model.config.block_size, max(int(lengths.max()) - 1, 1))


def dataset_loss(
    model: GPT,
    data: Manifest,
    split: SplitName,
    *,
    block_size: int,
    stride: int | None,
    micro_batch_size: int,
    dtype: DTypeLike,
    progress: Progress,
) -> tuple[float, int]:
    """`split_loss` of a text, `answers_loss` of conversations, and errors as theirs."""
    tokens, flags = data.tokens(split), data.flags(split)
    if flags is None:
        return split_loss(
            model, tokens, block_size=block_size, stride=stride, dtype=dtype,
            micro_batch_size=micro_batch_size, progress=progress,
        )  # fmt: skip
    if stride is not None:
        raise ValueError(
            f"stride={stride} does not apply to {data.name!r}, conversations that are each read "
            "by themselves; leave it out"
        )
    windows = PackedWindows(tokens, flags, block_size, seed=0)
    return answers_loss(
        model, windows, micro_batch_size=micro_batch_size, dtype=dtype, progress=progress
    )


def dataset_measures(
    model: GPT,
    data: Manifest,
    split: SplitName,
    *,
    block_size: int,
    stride: int | None,
    micro_batch_size: int,
    dtype: DTypeLike,
    progress: Callable[[int], None],
) -> dict[str, float | int | None]:
    """`measures` of a split and, as `tokens`, of how many it is: all, or of conversations those
    that are learnt, for whose text alone no bytes are counted. `progress` is told how many tokens
    of the split are done. Errors as `split_loss`."""
    n = len(data.tokens(split)) - 1
    loss, count = dataset_loss(
        model, data, split, block_size=block_size, stride=stride, dtype=dtype,
        micro_batch_size=micro_batch_size,
        progress=lambda done, total: progress(done * n // total),
    )  # fmt: skip
    if data.flags(split) is None:
        return {**measures(loss, count, data.splits[split].bytes), "tokens": count}
    return {**measures(loss, count, count), "bits_per_byte": None, "tokens": count}


def measures(loss: float, count: int, n_bytes: int) -> dict[str, float]:
    """What a mean loss over `count` tokens, of a text of `n_bytes`, is in each usual unit."""
    bits = loss * count / math.log(2)
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits / n_bytes}


def _windows(
    n_target: int, block_size: int, stride: int, rows: int
) -> Iterator[tuple[Int64[np.ndarray, " micro"], int]]:
    """Where the windows of a batch start, and how many of the last targets of each count.

    Batches are of one size, so that they share a program: the last may hold windows, or parts of
    them, that lie beyond the split.
    """
    first = 0
    if stride < block_size:
        yield np.zeros(1, np.int64), block_size
        first = 1
    n_window = 1 + max(0, -(-(n_target - block_size) // stride))
    rows = min(rows, n_window - first)
    for i in range(first, n_window, max(rows, 1)):
        yield np.arange(i, i + rows) * stride, stride


@eqx.filter_jit
def _losses(
    model: GPT, windows: Int[Array, "micro seq_plus_1"], n_counted: int
) -> Float[Array, "micro counted"]:
    """Of the last `n_counted` tokens of each window, given those before them."""
    hidden, _ = model.hidden(windows[:, :-1])
    losses = -token_scores(model, hidden[:, -n_counted:], windows[:, -n_counted:]).logprob
    return laid(losses, None, None)  # each process reads all of them
