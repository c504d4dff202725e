"""The head's loss and gradients on a CPU, by tiles of the vocabulary that its caches hold.

Of a tile's logits only the exponentials are kept, less the largest logit so far, in the dtype of
the products: the weight's gradient waits for their whole sum (the sums go along as in flash
attention, Dao et al. 2022, arXiv:2205.14135). Softmax's gradient is probability less target, and
probability is such an exponential times a number of each token's. So the exponentials are
multiplied as they are, and the tokens' vectors by these numbers. The targets' own are left out and
added in float32: a confident prediction keeps the digits of its small gradient.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eqx_gpt.ops.bits import as_bits, from_bits
from eqx_gpt.ops.matmul import large_product, transposed
from eqx_gpt.ops.platform import stored
from eqx_gpt.ops.rounding import rounded
from eqx_gpt.ops.softcap import bend_slope, bent
from eqx_gpt.shapes import Scalar

_TILE = 2048  # of the vocabulary; with 2048 tokens 16 MiB of float32
_MULTIPLE = 16  # of which a tile has some: rows of bfloat16 in a register


def has_tiles(n_vocab: int) -> bool:
    """Is a vocabulary so large that tiles of it gain something?"""
    return n_vocab >= 4 * _TILE


def loss_and_gradients(
    x: Float[Array, "rows d_model"],
    labels: Int[Array, " rows"],
    shares: Float[Array, " rows"],
    weight: Float[Array, "vocab d_model"],
    bias: Float[Array, " vocab"] | None,
    softcap: float | None,
    z_loss: float,
) -> tuple[
    tuple[Scalar, Float[Array, "vocab d_model"], Float[Array, " vocab"] | None],
    Float[Array, "rows d_model"],
]:
    """The sum of the tokens' losses, each times its share, and its gradients by weight, bias and
    `x`, all float32. The products are of the dtype of `x`. Of bfloat16 it has no second derivative.

    A label that is no token makes the loss nan.
    """
    n_vocab, n_tile = weight.shape[0], -(-weight.shape[0] // _TILE)
    size = -(-n_vocab // n_tile)
    size += -size % _MULTIPLE
    x_t, places, wide = transposed(x), jnp.arange(size), x.astype(jnp.float32)
    bits = as_bits(weight)  # bfloat16 would be made float32 as a whole, to be sliced

    def start(i: Array) -> Array:
        """The last tile begins earlier, and in the one before."""
        return jnp.minimum(i * size, n_vocab - size)

    def add_tile(sums: tuple[Array, Array, Array], i: Array) -> tuple[tuple, tuple[Array, Array]]:
        before, total, d_x_t = sums
        part = from_bits(lax.dynamic_slice_in_dim(bits, start(i), size), weight.dtype)
        part = stored(part.astype(x.dtype))
        logits = large_product(part, x_t)
        if bias is not None:
            offset = lax.dynamic_slice_in_dim(bias, start(i), size).astype(jnp.float32)
            logits = logits + offset[:, None]
        logits = bent(logits, softcap)
        top = stored(jnp.maximum(before, jnp.max(logits, axis=0)))
        ids = start(i) + places
        left_out = (ids[:, None] == labels[None, :]) | (ids < i * size)[:, None]
        power = stored(jnp.where(left_out, 0, jnp.exp(logits - top[None, :])))
        shrunk = jnp.exp(before - top)
        total = total * shrunk + jnp.sum(power, axis=0)
        if softcap is not None:
            power = power * bend_slope(logits, softcap)
        power = stored(rounded(power, x.dtype))
        d_x_t = d_x_t * shrunk[None, :] + large_product(transposed(part), power)
        return (top, total, d_x_t), (as_bits(power), top)

    nothing = jnp.zeros(len(x), jnp.float32)
    # Not -inf: of a first tile of -inf the difference would be nan.
    sums = nothing + jnp.finfo(jnp.float32).min, nothing, jnp.zeros(x_t.shape, jnp.float32)
    (top, others, d_x_t), kept = lax.scan(add_tile, sums, jnp.arange(n_tile))

    target = from_bits(bits[labels], weight.dtype).astype(x.dtype).astype(jnp.float32)
    logit = jnp.sum(wide * target, axis=-1)
    if bias is not None:
        logit = logit + bias[labels].astype(jnp.float32)
    logit = bent(logit, softcap)
    own = jnp.exp(logit - top)
    total = others + own
    lse = top + jnp.log(total)
    loss = lse - logit + z_loss * jnp.square(lse)
    loss = jnp.where((labels >= 0) & (labels < n_vocab), loss, jnp.nan)
    # By the logarithm of the sum, then by the target's logit: not as probability less one, of which
    # the rounding of large logits would leave little.
    d_lse = shares * (1 + 2 * z_loss * lse)
    d_logit = ((d_lse - shares) * own - shares * others) / total
    if softcap is not None:
        d_logit = d_logit * bend_slope(logit, softcap)
    factor = d_lse / total

    def add_gradients(
        sums: tuple[Array, Array | None], tile: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array | None], None]:
        (d_weight, d_bias), (i, power, before) = sums, tile
        power, here = from_bits(power, x.dtype), factor * jnp.exp(before - top)
        d_part = large_product(power, stored(rounded(wide * here[:, None], x.dtype)))
        d_weight = lax.dynamic_update_slice_in_dim(d_weight, d_part, start(i), 0)
        if d_bias is not None:
            d_offset = power.astype(jnp.float32) @ here
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, d_offset, start(i), 0)
        return (d_weight, d_bias), None

    # The last tile first: the one before writes what they share, which it alone has.
    d_bias = None if bias is None else jnp.zeros(n_vocab, jnp.float32)
    sums = jnp.zeros(weight.shape, jnp.float32), d_bias
    (d_weight, d_bias), _ = lax.scan(add_gradients, sums, (jnp.arange(n_tile), *kept), reverse=True)
    d_weight = d_weight.at[labels].add(wide * d_logit[:, None])
    d_bias = None if d_bias is None else d_bias.at[labels].add(d_logit)
    d_x = jnp.swapaxes(d_x_t, 0, 1) * factor[:, None] + target * d_logit[:, None]
    return (jnp.sum(loss * shares), d_weight, d_bias), d_x
