"""Decoding: a prefill, a loop over new tokens inside one compiled program, and the samplers.

Shapes are rounded up, so that prompts and outputs of similar lengths share their programs.
"""

from collections.abc import Iterator, Sequence

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT, check_tokens
from eqx_gpt.shapes import PRNGKey, Tokens, TokensLike

_GROUP = 256


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
        return _draw(self.filtered(logits), key)

    def filtered(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        """Of the tokens that may be drawn, logits over the temperature; of the others, -inf."""
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            # Without its indices, XLA would replace this by a sort of the whole vocabulary.
            least, _ = lax.optimization_barrier(lax.top_k(logits, self.top_k))
            logits = jnp.where(logits < least[..., -1:], -jnp.inf, logits)
        if self.top_p is not None:
            logits = jnp.where(_likeliest(logits, self.top_p), logits, -jnp.inf)
        if self.min_p is not None:
            least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


def _likeliest(
    logits: Float[Array, "*batch vocab"], share: Float[Array, ""]
) -> Bool[Array, "*batch vocab"]:
    """The fewest tokens with at least that share of the probability, and what equals the last.

    The last one's logit is found by halving the range of floats, as integers of the same order:
    32 sums over the vocabulary, which take a tenth of the time that sorting it does.
    """
    bits = lax.bitcast_convert_type(logits, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    rest = (1 - share) * jnp.sum(mass, axis=-1, keepdims=True)

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which cannot overflow
        up_to = jnp.where(ordered <= jnp.broadcast_to(middle, ordered.shape), mass, 0)
        kept = jnp.sum(up_to, axis=-1, keepdims=True) > rest
        return jnp.where(kept, low, middle + 1), jnp.where(kept, middle, high)

    highest = jnp.max(ordered, axis=-1, keepdims=True)
    lowest = jnp.full_like(highest, jnp.iinfo(jnp.int32).min)
    _, least = lax.fori_loop(0, 32, halve, (lowest, highest))
    return ordered >= jnp.broadcast_to(least, ordered.shape)


def _draw(logits: Float[Array, "*batch vocab"], key: PRNGKey) -> Int[Array, "*batch"]:
    """A token from softmax(logits): first a group of tokens, then one of the group.

    So the random numbers are as many as groups and members, not as many as tokens.
    """
    *batch, vocab = logits.shape
    padding = [(0, 0)] * len(batch) + [(0, -vocab % _GROUP)]
    groups = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(*batch, -1, _GROUP)
    key_group, key_member = jax.random.split(key)
    group = jax.random.categorical(key_group, jax.nn.logsumexp(groups, axis=-1), axis=-1)
    members = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    return group * _GROUP + jax.random.categorical(key_member, members, axis=-1)


def generate(
    model: GPT,
    tokens: TokensLike,
    max_new_tokens: int = 32,
    *,
    lengths: TokensLike | None = None,
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

    `eqx_gpt.for_inference(model)` is the model laid out for this.

    **Arguments:**

    - `tokens`: integers `(*batch, seq)`, of any length above 0.
    - `lengths`: for prompts of different lengths, integers `(*batch,)`: how many of the last
      tokens of each row are its prompt; what stands before is padding (`pad_prompts`). None: all.
    - `key`: for sampling; needed unless `temperature` is 0, which is greedy.
    - `temperature`, `top_k`, `top_p`, `min_p`: see `Sampler`.
    - `stop`: token ids; after one of them a row repeats it to the end.

    **Returns:** int32 `(*batch, seq + max_new_tokens)`: the prompt, then the new tokens.

    **Raises:** as `GPT.__call__` for the tokens (but not for their length); ValueError for a
    sampler setting outside its range, a missing key, lengths that do not fit or a stop token
    outside the vocabulary.
    """
    prompt, start = _checked_prompt(tokens, lengths, model.config, max_new_tokens)
    rules = Rules.init(model.config, key, temperature, top_k, top_p, min_p, stop)
    if max_new_tokens == 0:
        return prompt
    state, n_window = _prefilled(model, rules, prompt, start, max_new_tokens)
    state = _continued(model, rules, state, n_window + max_new_tokens)
    return _with_prompt(prompt, state, n_window, max_new_tokens)


def stream(
    model: GPT,
    tokens: TokensLike,
    max_new_tokens: int = 32,
    *,
    chunk: int = 16,
    lengths: TokensLike | None = None,
    key: PRNGKey | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[int] = (),
) -> Iterator[Int[np.ndarray, "*batch chunk"]]:
    """The new tokens of `generate`, `chunk` at a time, while the later ones are still to come.

    The arguments and errors are those of `generate`. Ends early once every row has stopped; the
    last array may be shorter than `chunk`.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    prompt, start = _checked_prompt(tokens, lengths, model.config, max_new_tokens)
    rules = Rules.init(model.config, key, temperature, top_k, top_p, min_p, stop)

    def chunks() -> Iterator[Int[np.ndarray, "*batch chunk"]]:
        if max_new_tokens == 0:
            return
        state, n_window = _prefilled(model, rules, prompt, start, max_new_tokens)
        given, end = n_window, n_window + max_new_tokens
        while given < end:
            state = _continued(model, rules, state, min(given + chunk, end))
            length = int(state.length)
            # A copy: the next chunk is written into the same memory.
            yield np.array(state.tokens)[..., given:length]
            given = end if bool(state.done.all()) else length

    return chunks()


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, fill: int = 0
) -> tuple[Int[np.ndarray, "batch seq"], Int[np.ndarray, " batch"]]:
    """Prompts of different lengths as `tokens` and `lengths` of `generate`: padded on the left
    with `fill`, so that all end together. ValueError if there is none or one is empty."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or not lengths.all():
        raise ValueError(f"prompts need at least one token each, got lengths {lengths.tolist()}")
    tokens = np.full((len(prompts), lengths.max()), fill, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[-len(prompt) :] = prompt
    return tokens, lengths


class Rules(eqx.Module):
    """How to draw, and when to stop."""

    sampler: Sampler
    key: PRNGKey
    stop: Int[Array, " n_stop"]

    @staticmethod
    def init(
        config: GPTConfig,
        key: PRNGKey | None,
        temperature: float | int,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        stop: Sequence[int],
    ) -> "Rules":
        if key is None and temperature != 0:
            raise ValueError("sampling needs key=jax.random.key(...); temperature=0 is greedy")
        for token in stop:
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"stop token {token} is outside 0 to {config.vocab_size - 1}")
        sampler = Sampler.init(temperature, top_k, top_p, min_p)
        key = jax.random.key(0) if key is None else key
        return Rules(sampler, key, jnp.asarray(tuple(stop), jnp.int32))


class State(eqx.Module):
    """Sequences being continued: the first `length` of `tokens` are there, `drawn` of them new."""

    tokens: Int[Array, "*batch total"]
    length: Int[Array, ""]
    drawn: Int[Array, ""]
    done: Bool[Array, "*batch"]
    cache: KVCache

    def draw(self, rules: Rules, logits: Float[Array, "*batch vocab"], n_token: int) -> "State":
        """With one token more in each row; only the first `n_token` of the vocabulary are real."""
        if n_token < logits.shape[-1]:
            real = jnp.arange(logits.shape[-1]) < n_token
            logits = jnp.where(jnp.broadcast_to(real, logits.shape), logits, -jnp.inf)
        drawn = rules.sampler(logits, jax.random.fold_in(rules.key, self.drawn)).astype(jnp.int32)
        last = lax.dynamic_index_in_dim(self.tokens, self.length - 1, axis=-1, keepdims=False)
        token = jnp.where(self.done, last, drawn)
        done = self.done | jnp.isin(token, rules.stop)
        tokens = lax.dynamic_update_index_in_dim(self.tokens, token, self.length, axis=-1)
        return State(tokens, self.length + 1, self.drawn + 1, done, self.cache)


def _checked_prompt(
    tokens: TokensLike, lengths: TokensLike | None, config: GPTConfig, max_new_tokens: int
) -> tuple[Tokens, Int[Array, "*batch"] | None]:
    """The prompt, and where each row of it begins."""
    prompt = check_tokens(tokens, config, any_length=True)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or above, got {max_new_tokens}")
    if lengths is None:
        return prompt, None
    seq, shape = prompt.shape[-1], np.shape(lengths)
    if shape != prompt.shape[:-1]:
        raise ValueError(f"lengths have shape {shape}, expected one a row: {prompt.shape[:-1]}")
    if isinstance(lengths, jax.core.Tracer):
        return prompt, seq - jnp.asarray(lengths, jnp.int32)
    found = np.asarray(lengths)
    if found.size and not (found.min() >= 1 and found.max() <= seq):
        raise ValueError(f"lengths must be 1 to {seq}, got {found.min()} to {found.max()}")
    return prompt, seq - jnp.asarray(found, jnp.int32)


def _cache_dtype(model: GPT) -> DTypeLike:
    """The model's; but a CPU would widen all of a bfloat16 cache again for every product."""
    dtype = model.wte.weight.dtype
    return jnp.float32 if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else dtype


def _prefilled(
    model: GPT, rules: Rules, prompt: Tokens, start: Int[Array, "*batch"] | None, n_new: int
) -> tuple[State, int]:
    """The state after the first new token, and how many tokens of the prompt it starts with."""
    block_size, seq = model.config.block_size, prompt.shape[-1]
    n_window = min(seq, block_size)
    window = prompt[..., seq - n_window :]
    if start is not None:
        start = jnp.maximum(start - (seq - n_window), 0)
    total = _rounded_up(n_window + n_new)
    padding = min(_rounded_up(n_window), block_size) - n_window
    window = jnp.pad(window, [(0, 0)] * (window.ndim - 1) + [(0, padding)])
    return _prefill(model, rules, window, jnp.int32(n_window), start, total), n_window


def _continued(model: GPT, rules: Rules, state: State, end: int) -> State:
    """Until rows are `end` tokens long, or all have stopped."""
    block_size = model.config.block_size
    state = _decode((model, rules, jnp.int32(min(end, block_size + 1))), state)
    return state if end <= block_size + 1 else _slide((model, rules, jnp.int32(end)), state)


def _rounded_up(n: int) -> int:
    """To a power of two, from 64 on to a multiple of 64."""
    return 1 << (n - 1).bit_length() if n < 64 else -(-n // 64) * 64


@eqx.filter_jit
def _prefill(
    model: GPT,
    rules: Rules,
    window: Tokens,
    length: Int[Array, ""],
    start: Int[Array, "*batch"] | None,
    total: int,
) -> State:
    """`window` holds `length` tokens, then padding, which no token sees: it comes after them all.
    `total` is the room for tokens."""
    config = model.config
    *batch, seq = window.shape
    cache = KVCache.init(config, batch, min(total, config.block_size), _cache_dtype(model), start)
    hidden, filled = model.hidden(window, cache=cache)
    assert filled is not None
    tokens = jnp.pad(window, [(0, 0)] * len(batch) + [(0, max(0, total - seq))])
    none = jnp.zeros((), jnp.int32)
    state = State(tokens, length, none, jnp.zeros(batch, bool), filled.advance(length - seq))
    return state.draw(rules, _logits_at(model, hidden, length - 1), config.real_vocab_size)


@eqx.filter_jit(donate="all-except-first")
def _decode(inputs: tuple[GPT, Rules, Int[Array, ""]], state: State) -> State:
    """Tokens from the cache until `end`. Donates `state`."""
    model, rules, end = inputs

    def step(state: State) -> State:
        last = lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=-1)
        hidden, cache = model.hidden(last, cache=state.cache)
        state = eqx.tree_at(lambda s: s.cache, state, cache)
        return state.draw(rules, _logits_at(model, hidden, 0), model.config.real_vocab_size)

    return lax.while_loop(lambda s: _running(s, end), step, state)


@eqx.filter_jit(donate="all-except-first")
def _slide(inputs: tuple[GPT, Rules, Int[Array, ""]], state: State) -> State:
    """Tokens from the last `block_size` ones until `end`. Donates `state`."""
    model, rules, end = inputs
    config = model.config

    def step(state: State) -> State:
        first = state.length - config.block_size
        window = lax.dynamic_slice_in_dim(state.tokens, first, config.block_size, axis=-1)
        start = state.cache.start
        start = None if start is None else jnp.maximum(start - first, 0)
        cache = KVCache.init(
            config, state.done.shape, config.block_size, _cache_dtype(model), start
        )
        hidden, _ = model.hidden(window, cache=cache)
        logits = _logits_at(model, hidden, config.block_size - 1)
        return state.draw(rules, logits, config.real_vocab_size)

    return lax.while_loop(lambda s: _running(s, end), step, state)


@eqx.filter_jit
def _with_prompt(
    prompt: Tokens, state: State, n_window: int, n_new: int
) -> Int[Array, "*batch total"]:
    """The prompt and the new tokens. Rows that all stopped early repeat their last one."""
    last = lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=-1)
    there = jnp.arange(state.tokens.shape[-1]) < state.length
    tokens = jnp.where(jnp.broadcast_to(there, state.tokens.shape), state.tokens, last)
    new = tokens[..., n_window : n_window + n_new]
    return jnp.concatenate([prompt, new], axis=-1)


def _running(state: State, end: Int[Array, ""]) -> Bool[Array, ""]:
    return (state.length < end) & ~jnp.all(state.done)


def _logits_at(model: GPT, hidden: Array, index: int | Array) -> Float[Array, "*batch vocab"]:
    at = lax.dynamic_slice_in_dim(hidden, index, 1, axis=-2)
    return model.unembed(at)[..., 0, :]
