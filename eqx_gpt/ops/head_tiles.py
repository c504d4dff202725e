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
from eqx_gpt.ops.matmul import product, transposed
from eqx_gpt.ops.platform import stored
from eqx_gpt.ops.rounding import rounded
from eqx_gpt.shapes import Scalar

_TILE = 2048  # of the vocabulary; with 2048 tokens 16 MiB of float32
_MULTIPLE = 16  # of which a tile has some: rows of bfloat16 in a register


def has_tiles(n_vocab: int) -> bool:
    """Is a vocabulary so large that tiles of it gain something?"""
    return n_vocab >= 4 * _TILE


def bent(logits: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    """softcap * tanh(logits / softcap)"""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def bend_slope(logits: Float[Array, "*shape"], softcap: float) -> Float[Array, "*shape"]:
    """The slope of `bent`, of what it gave."""
    return 1 - jnp.square(logits / softcap)


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
    `x`, all float32. The products are of the dtype of `x`."""
    n_vocab, n_tile = weight.shape[0], -(-weight.shape[0] // _TILE)
    size = -(-n_vocab // n_tile)
    size += -size % _MULTIPLE
    x_t, places = transposed(x), jnp.arange(size)
    wide, n_token = x.astype(jnp.float32), len(x)

    def start(i: Array) -> Array:
        """The last tile begins earlier, and in the one before."""
        return jnp.minimum(i * size, n_vocab - size)

    def of_tokens(numbers: Float[Array, " rows"]) -> Float[Array, "rows 1"]:
        return numbers[:, None]

    def add_tile(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
        before, total, d_x_t, powers, tops = carry
        part = stored(lax.dynamic_slice_in_dim(weight, start(i), size).astype(x.dtype))
        logits = product(part, x_t)
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
        d_x_t = d_x_t * shrunk[None, :] + product(transposed(part), power)
        powers = lax.dynamic_update_index_in_dim(powers, as_bits(power), i, 0)
        return (top, total, d_x_t, powers, tops.at[i].set(top)), None

    nothing = jnp.zeros(n_token, jnp.float32)
    bits = as_bits(jnp.zeros((), x.dtype)).dtype
    (top, total, d_x_t, powers, tops), _ = lax.scan(
        add_tile,
        (
            nothing - jnp.inf, nothing, jnp.zeros(x.shape[::-1], jnp.float32),
            jnp.zeros((n_tile, size, n_token), bits), jnp.zeros((n_tile, n_token), jnp.float32),
        ),
        jnp.arange(n_tile),
    )  # fmt: skip

    target = weight[labels].astype(x.dtype).astype(jnp.float32)
    logit = jnp.sum(wide * target, axis=-1)
    if bias is not None:
        logit = logit + bias[labels].astype(jnp.float32)
    logit = bent(logit, softcap)
    total = total + jnp.exp(logit - top)
    lse = top + jnp.log(total)
    loss = lse - logit + z_loss * jnp.square(lse)
    # By the logarithm of the sum, and by the target's own logit.
    factor = shares * (1 + 2 * z_loss * lse)
    d_logit = shares * jnp.expm1(logit - lse) + (factor - shares) * jnp.exp(logit - lse)
    if softcap is not None:
        d_logit = d_logit * bend_slope(logit, softcap)
    factor = factor / total

    def add_gradients(
        carry: tuple[Array, Array | None], i: Array
    ) -> tuple[tuple[Array, Array | None], None]:
        d_weight, d_bias = carry
        power, here = from_bits(powers[i], x.dtype), factor * jnp.exp(tops[i] - top)
        d_part = product(power, stored(rounded(wide * of_tokens(here), x.dtype)))
        d_weight = lax.dynamic_update_slice_in_dim(d_weight, d_part, start(i), 0)
        if d_bias is not None:
            d_part = power.astype(jnp.float32) @ here
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, d_part, start(i), 0)
        return (d_weight, d_bias), None

    # The last tile first: the one before writes what they share, which it alone has.
    d_bias = None if bias is None else jnp.zeros(n_vocab, jnp.float32)
    (d_weight, d_bias), _ = lax.scan(
        add_gradients,
        (jnp.zeros(weight.shape, jnp.float32), d_bias),
        jnp.arange(n_tile),
        reverse=True,
    )
    d_weight = d_weight.at[labels].add(wide * of_tokens(d_logit))
    d_bias = None if d_bias is None else d_bias.at[labels].add(d_logit)
    d_x = jnp.swapaxes(d_x_t, 0, 1) * of_tokens(factor) + target * of_tokens(d_logit)
    return (jnp.sum(loss * shares), d_weight, d_bias), d_x
