"""What happens to each position by itself: norms, activations, look-ups in a table.

All compute in float32 and give the dtype of their input. Their gradients keep the inputs alone
and compute the rest again, for on every platform moving numbers takes longer than making them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eqx_gpt.ops.matmul import product
from eqx_gpt.ops.platform import by_platform
from eqx_gpt.ops.rounding import rounded, widened

Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]


def _gelu(x: Array) -> Array:
    # As PyTorch writes it. jax.nn's has erfc for the digits of its tail, and takes twice as long.
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}
_ONE_HOT_ROWS = 1024


@partial(jax.checkpoint, static_argnums=(1,))
def activate(x: Float[Array, "*shape"], kind: Activation) -> Float[Array, "*shape"]:
    """`kind` of each number: gelu (Hendrycks & Gimpel 2016, arXiv:1606.08415) exact or by its tanh
    formula, relu, relu squared (So et al. 2021, arXiv:2109.08668), silu."""
    return rounded(_ACTIVATIONS[kind](widened(x)), x.dtype)


@partial(jax.checkpoint, static_argnums=(2,))
def activate_gated(
    gate: Float[Array, "*shape"], x: Float[Array, "*shape"], kind: Activation
) -> Float[Array, "*shape"]:
    """activation(gate) * x (Shazeer 2020, arXiv:2002.05202)."""
    y = _ACTIVATIONS[kind](widened(gate)) * widened(x)
    return rounded(y, x.dtype)


@partial(jax.checkpoint, static_argnums=(3, 4))
def normalize(
    x: Float[Array, "*batch d"],
    scale: Float[Array, " d"] | None,
    bias: Float[Array, " d"] | None,
    kind: Literal["layernorm", "rmsnorm"],
    eps: float,
) -> Float[Array, "*batch d"]:
    """The last axis with variance 1 (layernorm: and mean 0; Ba et al. 2016, arXiv:1607.06450) or
    mean square 1 (Zhang & Sennrich 2019, arXiv:1910.07467), then `* scale + bias`."""
    y = widened(x)
    if kind == "layernorm":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return rounded(y, x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table: Float[Array, "rows d"], ids: Int[Array, "*batch"], dtype: DTypeLike
) -> Float[Array, "*batch d"]:
    """table[ids] as `dtype`; the gradient of a row that is met often is summed in float32."""
    return table[ids].astype(dtype)


def _look_up_forward(
    table: Array, ids: Array, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    return table[ids].astype(dtype), (table, ids)


def _look_up_backward(
    dtype: DTypeLike, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, None]:
    table, ids = residuals
    n_row, ids, g = table.shape[0], ids.reshape(-1), g.reshape(-1, g.shape[-1])

    def scatter(ids: Array, g: Array) -> Array:
        return jnp.zeros(table.shape, jnp.float32).at[ids].add(g.astype(jnp.float32))

    def multiply(ids: Array, g: Array) -> Array:
        one_hot = (jnp.arange(n_row)[:, None] == ids[None, :]).astype(g.dtype)
        return product(one_hot, g)

    # A CPU scatters one number at a time.
    on_cpu = multiply if n_row <= _ONE_HOT_ROWS else scatter
    d_table = by_platform(ids, g, cpu=on_cpu, default=scatter)
    return d_table.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)
