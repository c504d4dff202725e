"""The compiled programs of decoding: a prompt, then tokens from the cache, then a sliding window.

What may be asked for and how is in `eqx_gpt/generate.py`.
"""

from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT
from eqx_gpt.sampling import Sampler
from eqx_gpt.shapes import PRNGKey, Tokens


class Rules(eqx.Module):
    """How to draw, when to stop, and whether to keep the tokens' log-probabilities."""

    sampler: Sampler
    key: PRNGKey
    stop: Int[Array, " n_stop"]
    logprobs: bool = eqx.field(static=True)

    @staticmethod
    def init(
        config: GPTConfig,
        sampler: Sampler,
        key: PRNGKey | None,
        stop: Sequence[int] = (),
        *,
        logprobs: bool = False,
    ) -> "Rules":
        if key is None and sampler.temperature is not None:
            raise ValueError("sampling needs key=jax.random.key(...); temperature=0 is greedy")
        for token in stop:
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"stop token {token} is outside 0 to {config.vocab_size - 1}")
        key = jax.random.key(0) if key is None else key
        return Rules(sampler, key, jnp.asarray(tuple(stop), jnp.int32), logprobs)


class State(eqx.Module):
    """Sequences being continued: the first `length` of `tokens` are there, `drawn` of them new.

    The cache holds all but the last of them. `passes` counts how often the model ran; `seen` is
    what the repetition penalty applies to.
    """

    tokens: Int[Array, "*batch total"]
    logprobs: Float[Array, "*batch total"] | None
    length: Int[Array, ""]
    drawn: Int[Array, ""]
    passes: Int[Array, ""]
    done: Bool[Array, "*batch"]
    seen: Bool[Array, "*batch vocab"] | None
    cache: KVCache

    def draw(self, rules: Rules, logits: Float[Array, "*batch vocab"]) -> "State":
        """With one token more in each row, after one pass; rows that are done repeat their last."""
        key = jax.random.fold_in(rules.key, self.drawn)
        drawn = rules.sampler(logits, key, self.seen).astype(jnp.int32)
        last = lax.dynamic_index_in_dim(self.tokens, self.length - 1, axis=-1, keepdims=False)
        token = jnp.where(self.done, last, drawn)
        done = self.done | jnp.isin(token, rules.stop)
        logprobs = None
        if rules.logprobs:
            logprobs = jnp.where(self.done, 0.0, logprob(logits, token))[..., None]
        return self.extended(token[..., None], logprobs, 1, done)

    def extended(
        self,
        tokens: Int[Array, "*batch more"],
        logprobs: Float[Array, "*batch more"] | None,
        n: int | Int[Array, ""],
        done: Bool[Array, "*batch"],
    ) -> "State":
        """With the first `n` of `tokens` more, after one pass of the model."""
        all_tokens = lax.dynamic_update_slice_in_dim(self.tokens, tokens, self.length, axis=-1)
        all_logprobs, seen = self.logprobs, self.seen
        if all_logprobs is not None and logprobs is not None:
            all_logprobs = lax.dynamic_update_slice_in_dim(
                all_logprobs, logprobs, self.length, axis=-1
            )
        if seen is not None:
            for i in range(tokens.shape[-1]):
                seen = with_token(seen, tokens[..., i], i < jnp.asarray(n))
        return State(
            all_tokens,
            all_logprobs,
            self.length + n,
            self.drawn + n,
            self.passes + 1,
            done,
            seen,
            self.cache,
        )


def with_token(
    seen: Bool[Array, "*batch vocab"],
    token: Int[Array, "*batch"],
    there: bool | Bool[Array, ""] = True,
) -> Bool[Array, "*batch vocab"]:
    """`seen` with one token more in each row, if it is `there`."""
    return seen | (jax.nn.one_hot(token, seen.shape[-1], dtype=jnp.bool_) & there)


def logprob(
    logits: Float[Array, "*batch vocab"], token: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """What the model itself gives the token, whatever the sampler does to its logits."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def real_logits(model: GPT, hidden: Float[Array, "*batch seq d"]) -> Float[Array, "*batch seq v"]:
    """Logits of the tokens that can occur: without the padding of the vocabulary."""
    return model.unembed(hidden)[..., : model.config.real_vocab_size]


def cache_dtype(model: GPT) -> DTypeLike:
    """The model's; but a CPU would widen all of a bfloat16 cache again for every product."""
    dtype = model.wte.weight.dtype
    return jnp.float32 if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else dtype


def read_window(
    model: GPT, window: Tokens, start: Int[Array, "*batch"] | None, total: int
) -> tuple[Float[Array, "*batch seq d_model"], KVCache]:
    """The residual stream of whole sequences, and a cache with them and room for `total`."""
    capacity = min(total, model.config.block_size)
    cache = KVCache.init(model.config, window.shape[:-1], capacity, cache_dtype(model), start)
    hidden, filled = model.hidden(window, cache=cache)
    assert filled is not None
    return hidden, filled


@eqx.filter_jit
def prefill(
    model: GPT,
    rules: Rules,
    window: Tokens,
    length: Int[Array, ""],
    start: Int[Array, "*batch"] | None,
    total: int,
) -> State:
    """The state after the first new token.

    `window` holds `length` tokens, then padding, which no token sees: it comes after them all.
    `total` is the room for tokens.
    """
    *batch, seq = window.shape
    hidden, cache = read_window(model, window, start, total)
    tokens = jnp.pad(window, [(0, 0)] * len(batch) + [(0, max(0, total - seq))])
    none = jnp.zeros((), jnp.int32)
    state = State(
        tokens,
        jnp.zeros(tokens.shape, jnp.float32) if rules.logprobs else None,
        length,
        none,
        none,
        jnp.zeros(batch, bool),
        None
        if rules.sampler.repetition_penalty is None
        else _seen(window, length, start, model.config.real_vocab_size),
        cache.advance(length - seq),
    )
    return state.draw(rules, _logits_at(model, hidden, length - 1))


@eqx.filter_jit(donate="all-except-first")
def decode(inputs: tuple[GPT, Rules, Int[Array, ""]], state: State) -> State:
    """Tokens from the cache until rows are `end` long, or all done. Donates `state`."""
    model, rules, end = inputs

    def step(state: State) -> State:
        last = lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=-1)
        hidden, cache = model.hidden(last, cache=state.cache)
        state = eqx.tree_at(lambda s: s.cache, state, cache)
        return state.draw(rules, _logits_at(model, hidden, 0))

    return lax.while_loop(lambda s: running(s, end), step, state)


@eqx.filter_jit(donate="all-except-first")
def slide(inputs: tuple[GPT, Rules, Int[Array, ""]], state: State) -> State:
    """Tokens from the last `block_size` ones until `end`. Donates `state`."""
    model, rules, end = inputs
    block_size = model.config.block_size

    def step(state: State) -> State:
        first = state.length - block_size
        window = lax.dynamic_slice_in_dim(state.tokens, first, block_size, axis=-1)
        start = state.cache.start
        start = None if start is None else jnp.maximum(start - first, 0)
        hidden, _ = read_window(model, window, start, block_size)
        return state.draw(rules, _logits_at(model, hidden, block_size - 1))

    return lax.while_loop(lambda s: running(s, end), step, state)


@eqx.filter_jit
def with_room(state: State, room: int, block_size: int) -> State:
    """The same with room for `room` tokens; the cache grows as far as the model can look back."""

    *batch, old = state.tokens.shape
    longer = partial(jnp.pad, pad_width=[(0, 0)] * len(batch) + [(0, room - old)])
    tokens, logprobs = jax.tree.map(longer, (state.tokens, state.logprobs))
    cache = state.cache.with_capacity(min(room, block_size))
    return eqx.tree_at(
        lambda s: (s.tokens, s.logprobs, s.cache), state, (tokens, logprobs, cache),
        is_leaf=lambda x: x is None,
    )  # fmt: skip


def running(state: State, end: Int[Array, ""]) -> Bool[Array, ""]:
    return (state.length < end) & ~jnp.all(state.done)


def _logits_at(model: GPT, hidden: Array, index: int | Array) -> Float[Array, "*batch vocab"]:
    at = lax.dynamic_slice_in_dim(hidden, index, 1, axis=-2)
    return real_logits(model, at)[..., 0, :]


def _seen(
    window: Tokens, length: Int[Array, ""], start: Int[Array, "*batch"] | None, vocab: int
) -> Bool[Array, "*batch vocab"]:
    """Which tokens each row of a window has, but for its padding at both ends."""
    *batch, seq = window.shape
    position = jnp.broadcast_to(jnp.arange(seq), window.shape)
    there = position < length
    if start is not None:
        there = there & (position >= start[..., None])
    ids = jnp.where(there, window, vocab).reshape(-1, seq)
    rows = jnp.broadcast_to(jnp.arange(len(ids))[:, None], ids.shape)
    none = jnp.zeros((len(ids), vocab), bool)
    return none.at[rows, ids].set(True, mode="drop").reshape(*batch, vocab)
