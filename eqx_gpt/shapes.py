"""The glossary: every dimension name that the checked annotations use, and the array aliases.

    *batch      any leading dimensions: none for one sequence, one for a batch, more if you like
    seq         positions of the input, T in most papers
    cache       positions that a key-value cache can hold
    vocab       rows of the token embedding
    d_model     width of the residual stream, `n_embd`
    d_ff        hidden width of the mlp, `n_inner`
    head        query heads, `n_head`
    kv_head     key and value heads, `n_kv_head`; `head` is a multiple of it
    head_dim    width of one head
    layer       blocks, `n_layer`; the leading axis of every leaf of the stack
    in, out     a linear map's inputs and outputs
    rows, d     a table of vectors: how many, how wide

In the train step: `accum` micro-batches, each of `micro` sequences.
"""

from collections.abc import Sequence
from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

Tokens = Int[Array, "*batch seq"]
TokensLike = ArrayLike | Sequence[Any]  # lists too; `check_tokens` refuses what is not tokens
Hidden = Float[Array, "*batch seq d_model"]
Logits = Float[Array, "*batch seq vocab"]
Scalar = Float[Array, ""]
PRNGKey = Key[Array, ""]
