"""Decoding: continuing tokens, all at once (`generate`) or some at a time (`stream`).

The programs are in `eqx_gpt/decoding.py` and `eqx_gpt/speculative.py`. Shapes are rounded up, so
that prompts and outputs of similar lengths share their programs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.decoding import Rules, State, cache_dtype, decode, prefill, slide, with_room
from eqx_gpt.gpt import GPT, check_tokens
from eqx_gpt.inference import lay_out
from eqx_gpt.sampling import Sampler
from eqx_gpt.shapes import PRNGKey, Tokens, TokensLike
from eqx_gpt.speculative import Draft, read_prompt, speculate

_SMALL_CACHE = 2**23  # bytes


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
    repetition_penalty: float | None = None,
    stop: Sequence[int] = (),
    draft: Draft | None = None,
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
    - `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`: see `Sampler`. The penalty
      applies to the new tokens and to the prompt's, as far as these fit into `block_size`.
    - `stop`: token ids; after one of them a row repeats it to the end.
    - `draft`: a small model that proposes tokens (`eqx_gpt.speculative`): other draws, but from
      the same distribution, and when greedy the same tokens. Not beyond its own `block_size`.

    **Returns:** int32 `(*batch, seq + max_new_tokens)`: the prompt, then the new tokens.

    **Raises:** as `GPT.__call__` for the tokens (but not for their length); ValueError for a
    sampler setting outside its range, a missing key, lengths that do not fit, a stop token
    outside the vocabulary or a draft with another vocabulary.
    """
    sampler = Sampler.init(temperature, top_k, top_p, min_p, repetition_penalty)
    rules = Rules.init(model.config, sampler, key, stop)
    return _Run(model, tokens, lengths, max_new_tokens, rules, draft).finished().tokens


class Generated(NamedTuple):
    """What `generate_with_logprobs` returns.

    - `tokens`: those of `generate`.
    - `logprobs`: of the new tokens, what the model itself gives each one after those before it,
      at temperature 1 and unfiltered, in nats. 0 where a row repeats its stop token.
    - `passes`: how often the model ran; a draft makes it fewer than there are new tokens.
    """

    tokens: Int[Array, "*batch total"]
    logprobs: Float[Array, "*batch new"]
    passes: Int[Array, ""]


def generate_with_logprobs(
    model: GPT,
    tokens: TokensLike,
    max_new_tokens: int = 32,
    *,
    lengths: TokensLike | None = None,
    key: PRNGKey | None = None,
    stop: Sequence[int] = (),
    draft: Draft | None = None,
    temperature: float | int = 1.0,
    **sampler: Any,
) -> Generated:
    """As `generate`, with how likely the model found each new token."""
    rules = Rules.init(model.config, Sampler.init(temperature, **sampler), key, stop, logprobs=True)
    return _Run(model, tokens, lengths, max_new_tokens, rules, draft).finished()


def stream(
    model: GPT,
    tokens: TokensLike,
    max_new_tokens: int = 32,
    *,
    chunk: int = 16,
    lengths: TokensLike | None = None,
    key: PRNGKey | None = None,
    stop: Sequence[int] = (),
    draft: Draft | None = None,
    temperature: float | int = 1.0,
    **sampler: Any,
) -> Iterator[Int[np.ndarray, "*batch chunk"]]:
    """The new tokens of `generate`, `chunk` at a time, while the later ones are still to come.

    The arguments and errors are those of `generate`. Ends early once every row has stopped; the
    last array may be shorter than `chunk`, and with a draft others may be longer.
    """
    rules = Rules.init(model.config, Sampler.init(temperature, **sampler), key, stop)
    run = _Run(model, tokens, lengths, max_new_tokens, rules, draft)
    return (new for new, _ in run.chunks(chunk))


def stream_with_logprobs(
    model: GPT,
    tokens: TokensLike,
    max_new_tokens: int = 32,
    *,
    chunk: int = 16,
    lengths: TokensLike | None = None,
    key: PRNGKey | None = None,
    stop: Sequence[int] = (),
    draft: Draft | None = None,
    temperature: float | int = 1.0,
    **sampler: Any,
) -> Iterator[tuple[Int[np.ndarray, "*batch chunk"], Float[np.ndarray, "*batch chunk"]]]:
    """As `stream`, with how likely the model found each new token (see `Generated`)."""
    rules = Rules.init(model.config, Sampler.init(temperature, **sampler), key, stop, logprobs=True)
    run = _Run(model, tokens, lengths, max_new_tokens, rules, draft)
    return ((new, logprobs) for new, logprobs in run.chunks(chunk) if logprobs is not None)


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


class _Run:
    """One continuation: which programs run, from where to where.

    The prompt is cut and padded, and the answer put together, by NumPy on the host and placed by
    `device_put`, so that no program is compiled for each length; by jax where a caller traces.
    """

    def __init__(
        self,
        model: GPT,
        tokens: TokensLike,
        lengths: TokensLike | None,
        max_new_tokens: int,
        rules: Rules,
        draft: Draft | None,
    ) -> None:
        self.prompt, self.start = _checked_prompt(tokens, lengths, model.config, max_new_tokens)
        self.model, self.rules, self.n_new = model, rules, max_new_tokens
        self.draft = None if draft is None else draft.checked(model.config)
        self.n_window = min(self.prompt.shape[-1], model.config.block_size)
        self.end = self.n_window + max_new_tokens
        self.draft_cache: KVCache | None = None

    def finished(self) -> Generated:
        if self.n_new == 0:
            none = jnp.zeros((*self.prompt.shape[:-1], 0), jnp.float32)
            return Generated(self.prompt, none, jnp.zeros((), jnp.int32))
        state = self._begun()
        return self._output(self._continued(state, self.n_window + 1, self.end))

    def chunks(
        self, chunk: int
    ) -> Iterator[tuple[Int[np.ndarray, "*batch chunk"], Float[np.ndarray, "*batch chunk"] | None]]:
        """ValueError, before the first is asked for, if `chunk` is below 1."""
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        return self._chunks(chunk)

    def _chunks(
        self, chunk: int
    ) -> Iterator[tuple[Int[np.ndarray, "*batch chunk"], Float[np.ndarray, "*batch chunk"] | None]]:
        if self.n_new == 0:
            return
        state, given, reached = self._begun(), self.n_window, self.n_window + 1
        while given < self.end:
            state = self._continued(state, reached, min(given + chunk, self.end))
            reached = int(state.length)
            # A copy: the next chunk is written into the same memory.
            logprobs = state.logprobs
            new = np.array(state.tokens)[..., given:reached]
            yield new, None if logprobs is None else np.array(logprobs)[..., given:reached]
            given = self.end if np.asarray(state.done).all() else reached

    def _begun(self) -> State:
        """After the first new token."""
        self.model = lay_out(self.model)
        xp = jnp if isinstance(self.prompt, jax.core.Tracer) else np
        prompt, n, block_size = xp.asarray(self.prompt), self.n_window, self.model.config.block_size
        seq, start = prompt.shape[-1], self.start
        if start is not None:
            start = jnp.maximum(start - (seq - n), 0)
        longest = block_size
        if self.draft is not None and n + 1 > self.draft.last_length(self.model.config):
            self.draft = None  # there is no room for a first round
        if self.draft is not None:
            longest = min(longest, self.draft.model.config.block_size)
        # A round writes what it cannot keep.
        spare = 0 if self.draft is None else self.draft.n_token + 1
        self.total = rounded_up(n + self.n_new + spare)
        n_row = math.prod(prompt.shape[:-1])
        # Elsewhere than on a CPU another program takes longer than it saves.
        inputs = jax.tree.leaves((self.model, prompt, self.rules, start))
        traced = any(isinstance(x, jax.core.Tracer) for x in inputs)
        at_once = self.draft is not None or traced or jax.default_backend() != "cpu"
        room = self.total if at_once else first_room(self.model, n_row, n + 1)
        self.room = min(room, self.total)
        padding = [(0, 0)] * (prompt.ndim - 1) + [(0, min(rounded_up(n), longest) - n)]
        window = jax.device_put(xp.pad(prompt[..., seq - n :], padding))
        if self.draft is not None:
            self.draft_cache = read_prompt(self.draft, window, jnp.int32(n), start, self.total)
        return prefill(self.model, self.rules, window, jnp.int32(n), start, self.room)

    def _continued(self, state: State, reached: int, end: int) -> State:
        """Until rows are `end` tokens long, or all have stopped; `reached` are there at least."""
        model, rules, block_size = self.model, self.rules, self.model.config.block_size
        cached_end = min(end, block_size + 1)
        if self.draft is not None and self.draft_cache is not None and reached < end:
            last = self.draft.last_length(model.config)
            if reached <= last:
                ends = jnp.int32(end), jnp.int32(self.end)
                state, self.draft_cache = speculate(
                    (model, self.draft, rules, *ends), state, self.draft_cache
                )
                reached = min(end, last + 1)
        while reached < cached_end:
            if reached == self.room:
                if np.asarray(state.done).all():
                    return state
                state = self._with_room(state, min(2 * self.room, self.total))
            reached = min(cached_end, self.room)
            state = decode((model, rules, jnp.int32(reached)), state)
        if max(reached, cached_end) < end:
            state = slide((model, rules, jnp.int32(end)), self._with_room(state, self.total))
        return state

    def _with_room(self, state: State, room: int) -> State:
        if room == self.room:
            return state
        self.room = room
        return with_room(state, room, self.model.config.block_size)

    def _output(self, state: State) -> Generated:
        """The prompt and the new tokens. Rows that all stopped early repeat their last one."""
        xp = jnp if isinstance(state.tokens, jax.core.Tracer) else np
        tokens, length = xp.asarray(state.tokens), xp.asarray(state.length)
        there = xp.broadcast_to(xp.arange(tokens.shape[-1]) < length, tokens.shape)
        tokens = xp.where(there, tokens, xp.take(tokens, length - 1, axis=-1)[..., None])
        new = slice(self.n_window, self.end)
        tokens = xp.concatenate([xp.asarray(self.prompt), tokens[..., new]], axis=-1)
        logprobs = xp.zeros(there.shape, xp.float32)
        if state.logprobs is not None:
            logprobs = xp.where(there, xp.asarray(state.logprobs), xp.float32(0))
        return Generated(jax.device_put(tokens), jax.device_put(logprobs[..., new]), state.passes)


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


def first_room(model: GPT, n_row: int, n: int) -> int:
    """For how many tokens a cache begins that holds `n`, and doubles when it is full.

    Every token reads the whole of it, and all weights. Where it is small beside them, and below a
    few megabytes, that takes less than another program.
    """
    config = model.config
    values = 2 * config.n_layer * config.n_kv_head * config.head_dim * max(n_row, 1)
    weights = sum(x.nbytes for x in jax.tree.leaves(model))
    small = max(_SMALL_CACHE, weights // 32)
    least = small // (values * jnp.dtype(cache_dtype(model)).itemsize)
    return max(rounded_up(n), 1 << max(6, least.bit_length()))


def rounded_up(n: int) -> int:
    """To a power of two, from 64 on to a multiple of 64."""
    return 1 << (n - 1).bit_length() if n < 64 else -(-n // 64) * 64
