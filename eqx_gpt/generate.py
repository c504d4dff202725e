"""Decoding: prefill, a loop over new tokens inside one compiled program, and the samplers."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqx_gpt.cache import KVCache
from eqx_gpt.gpt import GPT, check_tokens
from eqx_gpt.shapes import PRNGKey, Tokens, TokensLike


class Sampler(eqx.Module):
    """How a token is drawn from logits. `temperature` None takes the likeliest.

    Filters apply in this order, after the temperature: `top_k` keeps the k likeliest, `top_p`
    the smallest set with that much probability (arXiv:1904.09751), `min_p` those with at least
    that share of the likeliest one's probability (arXiv:2407.01082).
    """

    temperature: Float[Array, ""] | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None
    top_k: int | None = eqx.field(static=True)

    @staticmethod
    def init(
        temperature: float | int, top_k: int | None, top_p: float | None, min_p: float | None
    ) -> "Sampler":
        """ValueError for a setting outside its range. `temperature` 0 is greedy."""
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}; None keeps all tokens")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}; None keeps all tokens")
        if min_p is not None and not 0 <= min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {min_p}; None keeps all tokens")

        def number(x: float | None) -> Array | None:
            return None if x is None else jnp.asarray(x, jnp.float32)

        return Sampler(number(temperature or None), number(top_p), number(min_p), top_k)

    def __call__(self, logits: Float[Array, "*batch vocab"], key: PRNGKey) -> Int[Array, "*batch"]:
        if self.temperature is None:
            return jnp.argmax(logits, axis=-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None:
            descending = -jnp.sort(-logits, axis=-1)
            probability = jax.nn.softmax(descending, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            kept = jnp.where(before < self.top_p, descending, jnp.inf)
            logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
        if self.min_p is not None:
            least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1)


def generate(
    model: GPT,
    tokens: TokensLike,
    max_new_tokens: int = 32,
    *,
    key: PRNGKey | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[int] = (),
) -> Int[Array, "*batch total"]:
    """Continue `tokens` by `max_new_tokens` sampled ones.

    Beyond `block_size` the window slides: each token is drawn given the last `block_size`
    tokens, as in nanoGPT. Up to there the keys and values of earlier tokens are cached; a
    sliding window has to run the whole window again for each token.

    **Arguments:**

    - `tokens`: integers `(*batch, seq)`, of any length above 0.
    - `key`: for sampling; needed unless `temperature` is 0, which is greedy.
    - `temperature`, `top_k`, `top_p`, `min_p`: see `Sampler`.
    - `stop`: token ids; after one of them a row repeats it to the end.

    **Returns:** int32 `(*batch, seq + max_new_tokens)`: the prompt, then the new tokens.

    **Raises:** as `GPT.__call__` for the tokens (but not for their length); ValueError for a
    sampler setting outside its range, a missing key or a stop token outside the vocabulary.
    """
    config = model.config
    prompt = check_tokens(tokens, config, any_length=True)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or above, got {max_new_tokens}")
    if key is None and temperature != 0:
        raise ValueError("sampling needs key=jax.random.key(...); temperature=0 is greedy")
    for token in stop:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"stop token {token} is outside 0 to {config.vocab_size - 1}")
    sampler = Sampler.init(temperature, top_k, top_p, min_p)
    if max_new_tokens == 0:
        return prompt
    key = jax.random.key(0) if key is None else key
    window = prompt[..., -config.block_size :]
    new = _continue(model, window, key, sampler, max_new_tokens, tuple(stop))
    return jnp.concatenate([prompt, new], axis=-1)


@eqx.filter_jit
def _continue(
    model: GPT, window: Tokens, key: PRNGKey, sampler: Sampler, n_new: int, stop: tuple[int, ...]
) -> Int[Array, "*batch new"]:
    """The new tokens alone. `window` is the prompt, or its last `block_size` tokens."""
    config = model.config
    *batch, seq = window.shape
    n_cached = min(n_new, config.block_size - seq + 1)
    buffer = jnp.concatenate([window, jnp.zeros((*batch, n_new), jnp.int32)], axis=-1)

    def draw(logits: Float[Array, "*batch vocab"], i: Array, buffer: Array, done: Array) -> tuple:
        """Put the i-th new token into the buffer."""
        real = jnp.arange(config.vocab_size) < config.real_vocab_size
        logits = jnp.where(jnp.broadcast_to(real, logits.shape), logits, -jnp.inf)
        drawn = sampler(logits, jax.random.fold_in(key, i))
        token = jnp.where(done, buffer[..., seq + i - 1], drawn.astype(jnp.int32))
        done = done | jnp.isin(token, jnp.asarray(stop, jnp.int32))
        return buffer.at[..., seq + i].set(token), done

    def cached_step(state: tuple) -> tuple:
        i, buffer, done, cache, logits = state
        buffer, done = draw(logits, i, buffer, done)
        token = lax.dynamic_slice_in_dim(buffer, seq + i, 1, axis=-1)
        logits, cache = _last_logits(model, token, cache)
        return i + 1, buffer, done, cache, logits

    def sliding_step(state: tuple) -> tuple:
        i, buffer, done = state
        start = seq + i - config.block_size
        context = lax.dynamic_slice_in_dim(buffer, start, config.block_size, axis=-1)
        logits, _ = _last_logits(model, context, None)
        buffer, done = draw(logits, i, buffer, done)
        return i + 1, buffer, done

    def running(n: int, i: Array, done: Bool[Array, "*batch"]) -> Bool[Array, ""]:
        return (i < n) & ~jnp.all(done)

    # The last cached token is drawn after the loop: nothing has to be computed from it.
    cache = KVCache.init(config, batch, seq + n_cached - 1, model.wte.weight.dtype)
    logits, cache = _last_logits(model, window, cache)
    done = jnp.zeros(batch, bool)
    i, buffer, done, _, logits = lax.while_loop(
        lambda s: running(n_cached - 1, s[0], s[2]),
        cached_step,
        (jnp.zeros((), jnp.int32), buffer, done, cache, logits),
    )
    buffer, done = draw(logits, i, buffer, done)
    i = i + 1
    if n_new > n_cached:
        i, buffer, done = lax.while_loop(
            lambda s: running(n_new, s[0], s[2]), sliding_step, (i, buffer, done)
        )
    # A loop that ended early left every row at its stop token.
    final = lax.dynamic_slice_in_dim(buffer, seq + i - 1, 1, axis=-1)
    drawn = jnp.broadcast_to(jnp.arange(seq + n_new) < seq + i, buffer.shape)
    return jnp.where(drawn, buffer, final)[..., seq:]


def _last_logits(
    model: GPT, tokens: Tokens, cache: KVCache | None
) -> tuple[Float[Array, "*batch vocab"], KVCache | None]:
    hidden, cache = model.hidden(tokens, cache=cache)
    return model.unembed(hidden[..., -1:, :])[..., 0, :], cache
