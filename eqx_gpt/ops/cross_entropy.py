"""The head's logits, and their cross-entropy without ever holding all of them.

The logits of one chunk of tokens are made, used and dropped. While they exist, the forward pass
of a differentiated call also makes the gradients from them, so nothing is computed twice: three
products of (tokens x d_model x vocab) in all, as in the plain form.

Of large vocabularies CPUs do so tile by tile (`head_tiles.py`), but with label smoothing or where
a mesh splits the vocabulary.

On a mesh each device does so for its sequences and its part of the vocabulary (Megatron-LM's
vocabulary-parallel loss, Shoeybi et al. 2019, arXiv:1909.08053, section 3), and the gradients are
added up once, behind the last chunk.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from eqx_gpt.ops import head_tiles
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.ops.matmul import linear, product, product_transposed, transposed
from eqx_gpt.ops.meshed import BATCH, WEIGHT, fitting, mesh_here
from eqx_gpt.ops.platform import by_platform, stored
from eqx_gpt.ops.rounding import rounded
from eqx_gpt.ops.softcap import bend_slope, bent
from eqx_gpt.shapes import Scalar

T = TypeVar("T")

_CHUNK_LOGITS = 2**26  # elements: 256 MiB of float32
_TILED_CHUNK_BYTES = 2**28  # of the logits' exponentials


def head_logits(
    hidden: Float[Array, "*batch d_model"],
    weight: Float[Array, "vocab d_model"] | Int8,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "*batch vocab"]:
    """hidden @ weight.T + bias, bent to softcap * tanh(logits / softcap); float32."""
    return bent(linear(hidden, weight, bias, jnp.float32), softcap)


@dataclass(frozen=True)
class _Parts:
    """How the head's work is split over a mesh: batches, and where it divides it, the vocabulary.

    `over` is all axes that batches are split over, where they can be; `n_batch` into how many
    parts they are.
    """

    mesh: AbstractMesh
    hidden: PartitionSpec
    weight: PartitionSpec

    @staticmethod
    def of(mesh: AbstractMesh, hidden: Array, weight: Array) -> "_Parts":
        axes = (BATCH, *(None,) * (hidden.ndim - 1)) if hidden.ndim > 2 else ()
        return _Parts(mesh, fitting(mesh, hidden.shape, axes), fitting(mesh, weight.shape, WEIGHT))

    @property
    def over(self) -> tuple[str, ...]:
        return tuple(axis for axis in BATCH if axis in self.mesh.shape)

    @property
    def n_batch(self) -> int:
        split = self.hidden[0] is not None
        return math.prod(self.mesh.shape[axis] for axis in self.over) if split else 1

    @property
    def vocab(self) -> str | None:
        return self.weight[0]

    def run(self, fn: Callable[..., T], hidden: Array, weight: Array, targets: Array,
            bias: Array | None, token_weights: Array | None, out: Any) -> T:  # fmt: skip
        tokens = PartitionSpec(*self.hidden[:-1])
        in_specs = (self.hidden, self.weight, tokens, PartitionSpec(self.vocab), tokens)
        args = (hidden, weight, targets, bias, token_weights)
        in_specs = tuple(
            None if x is None else spec for x, spec in zip(args, in_specs, strict=True)
        )
        return jax.shard_map(fn, in_specs=in_specs, out_specs=out, check_vma=False)(*args)

    def gather(self, weight: Array) -> Array:
        if self.weight[1] is None:
            return weight
        return lax.all_gather(weight, self.weight[1], axis=1, tiled=True)

    def mean(self, x: Array) -> Array:
        """Of means over parts of the batch."""
        return lax.pmean(x, self.over) if self.over else x

    def scatter(self, d_weight: Array) -> Array:
        """`mean`, of which each device keeps its part."""
        fsdp = self.weight[1]
        if fsdp is None:
            return self.mean(d_weight)
        d_weight = d_weight / jnp.asarray(self.mesh.shape[fsdp], d_weight.dtype)
        d_weight = lax.psum_scatter(d_weight, fsdp, scatter_dimension=1, tiled=True)
        return lax.pmean(d_weight, "data") if "data" in self.over else d_weight


@dataclass(frozen=True)
class _Terms:
    """What the loss of a token is made of, from logits of all of the vocabulary's `n_vocab` tokens
    or, within `shard_map`, of those of this part along `axis` of the mesh."""

    n_vocab: int
    z_loss: float
    label_smoothing: float
    axis: str | None = None

    def over(self, axis: str | None) -> "_Terms":
        return replace(self, axis=axis)

    def ids(self, n: int) -> Int[Array, " vocab"]:
        """The tokens whose logits are here, `n` of them."""
        here = jnp.arange(n)
        return here if self.axis is None else lax.axis_index(self.axis) * n + here

    def powers(self, logits: Array) -> tuple[Float[Array, "rows vocab"], Float[Array, "rows 1"],
                                             Float[Array, "rows 1"]]:  # fmt: skip
        """exp(logits - top), their sum over the vocabulary, and top + log(sum)."""
        top = jnp.max(logits, axis=-1, keepdims=True)
        top = stored(top if self.axis is None else lax.pmax(top, self.axis))
        # Stored: a sum that makes the exponentials itself does so on one core of a CPU.
        powers = stored(jnp.exp(logits - jnp.broadcast_to(top, logits.shape)))
        total = stored(self._sum(jnp.sum(powers, axis=-1, keepdims=True)))
        return powers, total, top + jnp.log(total)

    def losses(self, logits: Array, lse: Array, labels: Array) -> Float[Array, " rows"]:
        """`lse` is the logarithm of sum(exp(logits))."""
        target = self._at(logits, labels)
        if self.label_smoothing:
            mean = self._sum(jnp.sum(logits, axis=-1)) / self.n_vocab
            target = (1 - self.label_smoothing) * target + self.label_smoothing * mean
        loss = lse[:, 0] - target
        return loss + self.z_loss * jnp.square(lse[:, 0]) if self.z_loss else loss

    def _at(self, logits: Array, labels: Array) -> Array:
        if self.axis is None:
            return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        n = logits.shape[-1]
        here = labels - lax.axis_index(self.axis) * n
        at = jnp.take_along_axis(logits, jnp.clip(here, 0, n - 1)[:, None], axis=-1)[:, 0]
        return self._sum(jnp.where((here >= 0) & (here < n), at, 0))

    def _sum(self, x: Array) -> Array:
        return x if self.axis is None else lax.psum(x, self.axis)


@partial(jax.custom_vjp, nondiff_argnums=(4, 6, 7))
def cross_entropy(
    hidden: Float[Array, "*batch seq d_model"],
    weight: Float[Array, "vocab d_model"],
    targets: Int[Array, "*batch seq"],
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
    token_weights: Float[Array, "*batch seq"] | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Scalar:
    """Mean of -log softmax(head_logits(...))[target] in nats a token, float32.

    `token_weights`, 1 if None, multiply the terms of the mean, over all tokens in any case. They
    are data: they get no gradient.

    `label_smoothing` is the share of the target that all tokens have alike (arXiv:1512.00567);
    `z_loss` times the squared logarithm of the softmax's denominator is added (arXiv:2204.02311,
    section 5).
    """
    mesh, terms = mesh_here(), _Terms(weight.shape[0], z_loss, label_smoothing)
    if mesh is None:
        return _loss(hidden, weight, targets, bias, softcap, token_weights, terms)
    parts = _Parts.of(mesh, hidden, weight)

    def of_part(
        hidden: Array, weight: Array, targets: Array, bias: Array | None, weights: Array | None
    ) -> Scalar:
        weight = parts.gather(weight)
        loss = _loss(hidden, weight, targets, bias, softcap, weights, terms.over(parts.vocab))
        return parts.mean(loss)

    return parts.run(of_part, hidden, weight, targets, bias, token_weights, out=PartitionSpec())


def _loss(
    hidden: Array,
    weight: Array,
    targets: Array,
    bias: Array | None,
    softcap: float | None,
    token_weights: Array | None,
    terms: _Terms,
) -> Scalar:
    rows, labels, real = _chunked(hidden, weight, targets, token_weights, _CHUNK_LOGITS)

    def add_chunk(total: Scalar, chunk: tuple[Array, Array, Array]) -> tuple[Scalar, None]:
        x, y, mask = chunk
        logits = head_logits(x, weight, bias, softcap)
        losses = terms.losses(logits, terms.powers(logits)[2], y)
        return total + jnp.sum(losses * mask), None

    total, _ = lax.scan(add_chunk, jnp.zeros((), jnp.float32), (rows, labels, real))
    return total / targets.size


def _forward(
    hidden: Array,
    weight: Array,
    targets: Array,
    bias: Array | None,
    softcap: float | None,
    token_weights: Array | None,
    z_loss: float,
    label_smoothing: float,
) -> tuple[Scalar, tuple[Array, Array, Array | None]]:
    mesh, terms = mesh_here(), _Terms(weight.shape[0], z_loss, label_smoothing)
    if mesh is None:
        return _loss_and_gradients(hidden, weight, targets, bias, softcap, token_weights, terms)
    parts = _Parts.of(mesh, hidden, weight)

    def of_part(
        hidden: Array, weight: Array, targets: Array, bias: Array | None, weights: Array | None
    ) -> tuple[Scalar, tuple[Array, Array, Array | None]]:
        loss, (d_hidden, d_weight, d_bias) = _loss_and_gradients(
            hidden, parts.gather(weight), targets, bias, softcap, weights, terms.over(parts.vocab)
        )
        if parts.vocab is not None:
            d_hidden = lax.psum(d_hidden, parts.vocab)
        d_hidden = d_hidden / jnp.asarray(parts.n_batch, d_hidden.dtype)
        d_bias = None if d_bias is None else parts.mean(d_bias)
        return parts.mean(loss), (d_hidden, parts.scatter(d_weight), d_bias)

    d_bias = None if bias is None else PartitionSpec(parts.vocab)
    out = PartitionSpec(), (parts.hidden, parts.weight, d_bias)
    return parts.run(of_part, hidden, weight, targets, bias, token_weights, out=out)


def _loss_and_gradients(
    hidden: Array,
    weight: Array,
    targets: Array,
    bias: Array | None,
    softcap: float | None,
    token_weights: Array | None,
    terms: _Terms,
) -> tuple[Scalar, tuple[Array, Array, Array | None]]:
    """As `_loss`, and the gradients of the hidden vectors, to be summed over the parts of the
    vocabulary, of the weight and of the bias."""

    def whole(
        hidden: Array, weight: Array, targets: Array, bias: Array | None, weights: Array | None
    ) -> tuple[Scalar, tuple[Array, Array, Array | None]]:
        of_chunk = _of_whole_vocabulary(weight.astype(hidden.dtype), bias, softcap, terms)
        chunks = _chunked(hidden, weight, targets, weights, _CHUNK_LOGITS)
        loss, (d_hidden, d_weight_t, d_bias) = _summed(of_chunk, chunks, hidden, bias)
        d_weight = jnp.swapaxes(d_weight_t, 0, 1).astype(weight.dtype)
        return loss, (d_hidden, d_weight, d_bias)

    def in_tiles(
        hidden: Array, weight: Array, targets: Array, bias: Array | None, weights: Array | None
    ) -> tuple[Scalar, tuple[Array, Array, Array | None]]:
        def of_chunk(chunk: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
            return head_tiles.loss_and_gradients(*chunk, weight, bias, softcap, terms.z_loss)

        most = _TILED_CHUNK_BYTES // hidden.dtype.itemsize
        chunks = _chunked(hidden, weight, targets, weights, most)
        loss, (d_hidden, d_weight, d_bias) = _summed(of_chunk, chunks, hidden, bias)
        return loss, (d_hidden, d_weight.astype(weight.dtype), d_bias)

    args = (hidden, weight, targets, bias, token_weights)
    if terms.label_smoothing or terms.axis is not None or not head_tiles.has_tiles(weight.shape[0]):
        return whole(*args)
    return by_platform(*args, cpu=in_tiles, default=whole)


def _of_whole_vocabulary(
    weight: Array, bias: Array | None, softcap: float | None, terms: _Terms
) -> Callable[[tuple[Array, Array, Array]], tuple[tuple[Scalar, Array, Array | None], Array]]:
    """A function of a chunk of tokens, their labels and shares in the loss: its sum, its gradients
    by the weight, transposed, and by the bias; and by the tokens."""
    weight_t = transposed(weight)
    offset = None if bias is None else bias.astype(jnp.float32)[None, :]

    def of_chunk(
        chunk: tuple[Array, Array, Array],
    ) -> tuple[tuple[Scalar, Array, Array | None], Array]:
        x, y, shares = chunk
        logits = product_transposed(x, weight)
        if offset is not None:
            logits = logits + jnp.broadcast_to(offset, logits.shape)
        logits = bent(logits, softcap)
        powers, power, lse = terms.powers(logits)
        loss = terms.losses(logits, lse, y)
        # The target is subtracted before any rounding, so that a confident prediction keeps the
        # digits of its small gradient.
        one_hot = (y[:, None] == terms.ids(weight.shape[0])[None, :]).astype(jnp.float32)
        probability = powers * jnp.broadcast_to(1 / power, powers.shape)
        if terms.z_loss:
            probability = probability * jnp.broadcast_to(1 + 2 * terms.z_loss * lse, logits.shape)
        if terms.label_smoothing:
            one_hot = (1 - terms.label_smoothing) * one_hot + terms.label_smoothing / terms.n_vocab
        d_logits = probability - one_hot
        d_logits = d_logits * jnp.broadcast_to(shares[:, None], d_logits.shape)
        if softcap is not None:
            d_logits = d_logits * bend_slope(logits, softcap)
        d_bias = None if bias is None else jnp.sum(d_logits, axis=0)
        d_logits = stored(rounded(d_logits, weight.dtype))
        # Both transposed: that moves less than transposing the logits' gradient would, and of a
        # product over the whole vocabulary, the other form is slow on CPUs.
        d_weight_t = product(transposed(x), d_logits)
        d_x = jnp.swapaxes(product_transposed(weight_t, d_logits), 0, 1)
        return (jnp.sum(loss * shares), d_weight_t, d_bias), d_x

    return of_chunk


def _summed(
    of_chunk: Callable[[tuple[Array, Array, Array]], tuple[tuple, Array]],
    chunks: tuple[Array, Array, Array],
    hidden: Array,
    bias: Array | None,
) -> tuple[Scalar, tuple[Array, Array, Array | None]]:
    """The loss over all chunks and its gradients, the weight's as it comes."""
    n_token = math.prod(hidden.shape[:-1])
    rows, labels, real = chunks
    shares = real / n_token

    def add_chunk(sums: tuple, chunk: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
        here, d_x = of_chunk(chunk)
        return jax.tree.map(jnp.add, sums, here), d_x

    # The first by itself: sums that begin with zeros would write and read all of the weight once
    # more.
    sums, d_first = of_chunk((rows[0], labels[0], shares[0]))
    d_rows = d_first[None]
    if len(rows) > 1:
        sums, d_rest = lax.scan(add_chunk, sums, (rows[1:], labels[1:], shares[1:]))
        d_rows = jnp.concatenate([d_rows, d_rest])
    loss, d_weight, d_bias = sums
    d_hidden = d_rows.reshape(-1, hidden.shape[-1])[:n_token].reshape(hidden.shape)
    d_bias = None if d_bias is None or bias is None else d_bias.astype(bias.dtype)
    return loss, (d_hidden.astype(hidden.dtype), d_weight, d_bias)


def _backward(
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    residuals: tuple[Array, Array, Array | None],
    g: Scalar,
) -> tuple[Array, Array, None, Array | None, None]:
    d_hidden, d_weight, d_bias = jax.tree.map(lambda d: d * g.astype(d.dtype), residuals)
    return d_hidden, d_weight, None, d_bias, None


cross_entropy.defvjp(_forward, _backward)


def _chunked(
    hidden: Array,
    weight: Array,
    targets: Array,
    token_weights: Array | None,
    most: int,
) -> tuple[Array, Array, Array]:
    """Tokens in equal chunks of at most so many logits, the last padded, and what each counts:
    padding nothing."""
    tokens = targets.size
    n_chunk = -(-tokens * weight.shape[0] // most)
    chunk = -(-tokens // n_chunk)
    padding = n_chunk * chunk - tokens
    rows = jnp.pad(hidden.reshape(tokens, -1), ((0, padding), (0, 0)))
    labels = jnp.pad(targets.reshape(tokens), (0, padding))
    real = (jnp.arange(n_chunk * chunk) < tokens).astype(jnp.float32)
    if token_weights is not None:
        real = jnp.pad(token_weights.astype(jnp.float32).reshape(tokens), (0, padding))
    return (
        rows.reshape(n_chunk, chunk, -1),
        labels.reshape(n_chunk, chunk),
        real.reshape(n_chunk, chunk),
    )
