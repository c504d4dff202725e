"""What the tokens of a dataset say of it before anything is trained on them.

From a sample of each split: how hard the tokens are to guess without any context (the entropy of
their frequencies), what the token before tells of the next one, and how alike the splits are. A
shuffled text or a split in another tokenizer's ids shows here at once.
"""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Int64, Shaped

_CHUNKS, _CHUNK = 32, 8192


@dataclass(frozen=True)
class TokenStatistics:
    """In nats a token, but for `largest_id` and `n_seen`.

    - `entropy`: of the training tokens' frequencies: the loss of a model without context.
    - `train_order`, `val_order`: what the token before tells of the next, beyond what it seems to
      in the same tokens shuffled; 0 where their order is lost.
    - `divergence`: how much worse the validation tokens are guessed from the training tokens'
      frequencies than from their own, and `usual_divergence`: the same of two halves of the
      training tokens.
    - `largest_id`, `n_seen`: of the sample, and how many different ids it has.
    """

    entropy: float
    train_order: float
    val_order: float
    divergence: float
    usual_divergence: float
    largest_id: int
    n_seen: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def token_statistics(
    train_tokens: Shaped[np.ndarray, " train"], val_tokens: Shaped[np.ndarray, " val"]
) -> TokenStatistics:
    """Of the ids of the two splits, in some hundredths of a second whatever their length."""
    train, val = _sample(train_tokens), _sample(val_tokens)
    halves = [np.concatenate(train[i::2]) for i in (0, 1)]
    whole = np.concatenate(train)
    return TokenStatistics(
        entropy=_entropy(whole),
        train_order=_order(train),
        val_order=_order(val),
        divergence=_divergence(np.concatenate(val), whole),
        usual_divergence=_divergence(*halves),
        largest_id=int(whole.max()),
        n_seen=len(np.unique(whole)),
    )


def _sample(tokens: Shaped[np.ndarray, " tokens"]) -> list[Int64[np.ndarray, " _"]]:
    """Pieces from all over a split, the same ones every time; all of a short one."""
    if len(tokens) <= _CHUNKS * _CHUNK:
        return [np.asarray(part, np.int64) for part in np.array_split(tokens, _CHUNKS) if len(part)]
    starts = np.linspace(0, len(tokens) - _CHUNK, _CHUNKS).astype(np.int64)
    return [np.asarray(tokens[first : first + _CHUNK], np.int64) for first in starts]


def _entropy(values: Int64[np.ndarray, " n"]) -> float:
    counts = np.unique(values, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _order(parts: list[Int64[np.ndarray, " _"]]) -> float:
    """Pairs are fewer the more the first tells of the second; shuffling takes that away, and
    leaves what few pairs seem to tell by chance."""
    shuffler = np.random.default_rng(0)
    size = max(int(part.max()) for part in parts) + 1

    def pairs(parts: list[Int64[np.ndarray, " _"]]) -> float:
        return _entropy(np.concatenate([part[:-1] * size + part[1:] for part in parts]))

    whole = shuffler.permutation(np.concatenate(parts))
    shuffled = np.split(whole, np.cumsum([len(part) for part in parts])[:-1])
    return pairs(shuffled) - pairs(parts)


def _divergence(of: Int64[np.ndarray, " n"], by: Int64[np.ndarray, " m"]) -> float:
    """Kullback-Leibler, with half a token more of each kind in `by`."""
    size = int(max(of.max(), by.max())) + 1
    counts = [np.bincount(values, minlength=size).astype(np.float64) for values in (of, by)]
    p, q = counts[0] / counts[0].sum(), (counts[1] + 0.5) / (counts[1] + 0.5).sum()
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())
