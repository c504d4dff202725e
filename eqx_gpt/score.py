"""How likely a model finds given tokens: of each its log-probability, and what it would have said.

The logits of one chunk of positions are made, used and dropped, as in training.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eqx_gpt.gpt import GPT
from eqx_gpt.shapes import Hidden

_CHUNK_LOGITS = 2**26  # elements: 256 MiB of float32


class TokenScores(eqx.Module):
    """Of each token the natural logarithm of its probability, and the likeliest in its place."""

    logprob: Float[Array, "*batch seq"]
    likeliest: Int[Array, "*batch seq"]


def token_scores(model: GPT, hidden: Hidden, tokens: Int[Array, "*batch seq"]) -> TokenScores:
    """Scores of `tokens`, where `hidden` (of `GPT.hidden`) stands at the position before each.

    So for a text: `token_scores(model, model.hidden(text[..., :-1])[0], text[..., 1:])`. The
    probabilities are those of all `vocab_size` tokens, as in the training loss. float32.
    """
    n_token, vocab = tokens.size, model.config.vocab_size
    n_chunk = -(-n_token * vocab // _CHUNK_LOGITS)
    chunk = -(-n_token // n_chunk)
    padding = n_chunk * chunk - n_token
    rows = jnp.pad(hidden.reshape(n_token, -1), ((0, padding), (0, 0)))
    labels = jnp.pad(tokens.reshape(n_token), (0, padding))

    def of_chunk(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        x, labels = inputs
        logits = model.unembed(x)
        at_labels = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return at_labels - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1)

    found = lax.map(of_chunk, (rows.reshape(n_chunk, chunk, -1), labels.reshape(n_chunk, chunk)))
    logprob, likeliest = (x.reshape(-1)[:n_token].reshape(tokens.shape) for x in found)
    return TokenScores(logprob, likeliest)
