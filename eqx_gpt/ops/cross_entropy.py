"""The head's logits, and their cross-entropy without ever holding all of them.

The logits of one chunk of tokens are made, used and dropped. While they exist, the forward pass
of a differentiated call also makes the gradients from them, so nothing is computed twice: three
products of (tokens x d_model x vocab) in all, as in the plain form.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eqx_gpt.ops.int8 import Int8
from eqx_gpt.ops.matmul import linear, product, transposed
from eqx_gpt.ops.platform import stored
from eqx_gpt.shapes import Scalar

_CHUNK_LOGITS = 2**26  # elements: 256 MiB of float32


def head_logits(
    hidden: Float[Array, "*batch d_model"],
    weight: Float[Array, "vocab d_model"] | Int8,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "*batch vocab"]:
    """hidden @ weight.T + bias, bent to softcap * tanh(logits / softcap); float32."""
    return _bent(linear(hidden, weight, bias, jnp.float32), softcap)


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
    rows, labels, real = _chunked(hidden, weight, targets, token_weights)

    def add_chunk(total: Scalar, chunk: tuple[Array, Array, Array]) -> tuple[Scalar, None]:
        x, y, mask = chunk
        logits = head_logits(x, weight, bias, softcap)
        lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return total + jnp.sum(_losses(logits, lse, y, z_loss, label_smoothing) * mask), None

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
    rows, labels, real = _chunked(hidden, weight, targets, token_weights)
    weight_t = transposed(weight)
    offset = None if bias is None else bias.astype(jnp.float32)[None, :]

    def add_chunk(
        carry: tuple[Scalar, Array, Array | None], chunk: tuple[Array, Array, Array]
    ) -> tuple[tuple[Scalar, Array, Array | None], Array]:
        total, d_weight, d_bias = carry
        x, y, mask = chunk
        logits = product(x, weight_t)
        if offset is not None:
            logits = logits + jnp.broadcast_to(offset, logits.shape)
        logits = _bent(logits, softcap)
        lse = stored(jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        loss = _losses(logits, lse, y, z_loss, label_smoothing)
        # The target is subtracted before any rounding, so that a confident prediction keeps the
        # digits of its small gradient.
        one_hot = (y[:, None] == jnp.arange(weight.shape[0])[None, :]).astype(jnp.float32)
        probability = jnp.exp(logits - jnp.broadcast_to(lse, logits.shape))
        if z_loss:
            probability = probability * jnp.broadcast_to(1 + 2 * z_loss * lse, logits.shape)
        if label_smoothing:
            one_hot = (1 - label_smoothing) * one_hot + label_smoothing / weight.shape[0]
        d_logits = probability - one_hot
        d_logits = d_logits * jnp.broadcast_to((mask / targets.size)[:, None], d_logits.shape)
        if softcap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / softcap))
        d_bias = None if d_bias is None else d_bias + jnp.sum(d_logits, axis=0)
        d_logits = stored(d_logits.astype(weight.dtype))
        d_weight = d_weight + product(transposed(d_logits), x)
        d_x = product(d_logits, weight).astype(x.dtype)
        return (total + jnp.sum(loss * mask), d_weight, d_bias), d_x

    d_weight = jnp.zeros(weight.shape, jnp.float32)
    d_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    zeros = (jnp.zeros((), jnp.float32), d_weight, d_bias)
    (total, d_weight, d_bias), d_rows = lax.scan(add_chunk, zeros, (rows, labels, real))
    d_hidden = d_rows.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    d_bias = None if d_bias is None or bias is None else d_bias.astype(bias.dtype)
    return total / targets.size, (d_hidden, d_weight.astype(weight.dtype), d_bias)


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
    hidden: Array, weight: Array, targets: Array, token_weights: Array | None
) -> tuple[Array, Array, Array]:
    """Tokens in equal chunks, the last padded, and what each counts: padding nothing."""
    tokens = targets.size
    n_chunk = -(-tokens * weight.shape[0] // _CHUNK_LOGITS)
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


def _bent(logits: Array, softcap: float | None) -> Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _at_labels(logits: Array, labels: Array) -> Array:
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def _losses(
    logits: Array, lse: Array, labels: Array, z_loss: float, label_smoothing: float
) -> Float[Array, " rows"]:
    target = _at_labels(logits, labels)
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing * jnp.mean(logits, axis=-1)
    loss = lse[:, 0] - target
    return loss + z_loss * jnp.square(lse[:, 0]) if z_loss else loss
