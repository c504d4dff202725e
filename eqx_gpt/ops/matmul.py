"""Products of activations with weights that lie as (out, in)."""

from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def linear(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*batch out"]:
    """`x @ weight.T`; `dtype` is the result's, None for that of `x`.

    Every backend accumulates products of bfloat16 in float32.
    """
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, contract_last, preferred_element_type=dtype)
