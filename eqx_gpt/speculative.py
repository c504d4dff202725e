"""Speculative decoding: a small model proposes, the large one checks several tokens in one pass.

Leviathan et al. 2023 (arXiv:2211.17192). What comes out is drawn from exactly the distribution of
the large model under the same sampler; a bad draft costs time, never quality.

Rows of a batch share one cache length, so all advance by what the row that accepts least does. A
token is kept or not by what came before it alone, so that this, too, leaves the distribution as it
is; but many rows accept less than one.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.decoding import (
    Rules,
    State,
    logprob,
    read_window,
    real_logits,
    running,
    with_token,
)
from eqx_gpt.gpt import GPT
from eqx_gpt.inference import lay_out
from eqx_gpt.sampling import Sampler, argmax, draw
from eqx_gpt.shapes import PRNGKey, Tokens


class Draft(eqx.Module):
    """A model of the same vocabulary that proposes `n_token` tokens at a time.

    The best `n_token` depends on how often the draft is right and on how much faster it is: about
    4 where it takes a tenth of the time.
    """

    model: GPT
    n_token: int = eqx.field(static=True, default=4)

    def __check_init__(self) -> None:
        if self.n_token < 1:
            raise ValueError(f"n_token of a Draft must be at least 1, got {self.n_token}")

    def checked(self, config: GPTConfig) -> "Draft":
        """Laid out for decoding. ValueError if it does not speak the tokens of that config."""
        ours, theirs = config.real_vocab_size, self.model.config.real_vocab_size
        if ours != theirs:
            raise ValueError(
                f"the draft has {theirs} tokens, the model {ours}: both need the same vocabulary; "
                "if only its padding differs, set n_token of both configs to the tokenizer's size "
                "(GPT.with_config)"
            )
        return Draft(lay_out(self.model), self.n_token)

    def last_length(self, config: GPTConfig) -> int:
        """The longest sequences that a round can start from: it needs room in both contexts."""
        return min(config.block_size, self.model.config.block_size) - self.n_token


@eqx.filter_jit
def read_prompt(
    draft: Draft,
    window: Tokens,
    length: Int[Array, ""],
    start: Int[Array, "*batch"] | None,
    total: int,
) -> KVCache:
    """The draft's cache for what `eqx_gpt.decoding.prefill` reads.

    It lacks one position more than the model's: a round begins with the last two tokens, so that
    it need not know whether the draft has run on the last one.
    """
    _, cache = read_window(draft.model, window, start, total)
    return cache.advance(length - window.shape[-1] - 1)


@eqx.filter_jit(donate="all-except-first")
def speculate(
    inputs: tuple[GPT, Draft, Rules, Int[Array, ""], Int[Array, ""]],
    state: State,
    draft_cache: KVCache,
) -> tuple[State, KVCache]:
    """Rounds until rows are `end` long, at most `longest`, or there is no room for a round.

    Inputs are the model, the draft, the rules, `end` and `longest`. Donates the rest.
    """
    model, draft, rules, end, longest = inputs
    last_length = draft.last_length(model.config)

    def step(carry: tuple[State, KVCache]) -> tuple[State, KVCache]:
        state, draft_cache = carry
        key_draft, key_verify = jax.random.split(jax.random.fold_in(rules.key, state.drawn))
        drafted, proposal, draft_cache = _propose(draft, rules, state, draft_cache, key_draft)
        last = lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=-1)
        tokens = jnp.concatenate([last, drafted], axis=-1)
        hidden, cache = model.hidden(tokens, cache=state.cache)
        assert cache is not None
        logits = real_logits(model, hidden)
        penalized = rules.sampler.penalized(logits, _seen_before(state.seen, drafted))
        tokens, n_accepted = verify(rules.sampler, penalized, proposal, drafted, key_verify)
        tokens, done, n = _until_stop(rules, state, tokens, n_accepted, longest)
        logprobs = None
        if rules.logprobs:
            before = jnp.concatenate([state.done[..., None], done[..., :-1]], axis=-1)
            logprobs = jnp.where(before, 0.0, logprob(logits, tokens))
        done = lax.dynamic_index_in_dim(done, n - 1, axis=-1, keepdims=False)
        # Both caches have grown by one for each draft and one more.
        unused = n - 1 - draft.n_token
        state = eqx.tree_at(lambda s: s.cache, state, cache.advance(unused))
        return state.extended(tokens, logprobs, n, done), draft_cache.advance(unused)

    def more(carry: tuple[State, KVCache]) -> Bool[Array, ""]:
        return running(carry[0], end) & (carry[0].length <= last_length)

    return lax.while_loop(more, step, (state, draft_cache))


def verify(
    sampler: Sampler,
    logits: Float[Array, "*batch n_checked vocab"],
    proposal: Float[Array, "*batch n_draft vocab"],
    drafted: Int[Array, "*batch n_draft"],
    key: PRNGKey,
) -> tuple[Int[Array, "*batch n_checked"], Int[Array, "*batch"]]:
    """What each row says, and how many of its drafts are in it: the paper's algorithm 1.

    **Arguments:**

    - `logits`: the model's, at the last token and at each of the drafts, one more than these.
    - `proposal`: the draft's logits, as its sampler has filtered them.
    - `drafted`: tokens that were drawn from `proposal`.

    **Returns:** the accepted drafts, one token more, and then no matter what; and their number.
    """
    n_draft = drafted.shape[-1]
    if sampler.temperature is None:
        best = argmax(logits).astype(jnp.int32)
        return best, _n_leading(best[..., :-1] == drafted)
    p = jax.nn.softmax(sampler.filtered(logits), axis=-1)
    q = jax.nn.softmax(proposal, axis=-1)
    key_accept, key_draw = jax.random.split(key)
    p_drafted, q_drafted = (
        jnp.take_along_axis(x[..., :n_draft, :], drafted[..., None], axis=-1)[..., 0]
        for x in (p, q)
    )
    uniform = jax.random.uniform(key_accept, drafted.shape)
    n_accepted = _n_leading(uniform * q_drafted < p_drafted)

    # After the accepted drafts one token from what p has more than q; after all of them from p.
    at = n_accepted[..., None, None]
    p_here = jnp.take_along_axis(p, at, axis=-2)[..., 0, :]
    q_here = jnp.take_along_axis(q, jnp.minimum(at, n_draft - 1), axis=-2)[..., 0, :]
    q_here = jnp.where((n_accepted < n_draft)[..., None], q_here, 0)
    rest = jnp.maximum(p_here - q_here, 0)
    # Of equal distributions rounding may leave nothing.
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p_here)
    more = draw(jnp.log(rest), key_draw).astype(jnp.int32)[..., None]
    padded = jnp.concatenate([drafted, more], axis=-1)
    place = jnp.broadcast_to(jnp.arange(n_draft + 1), padded.shape)
    return jnp.where(place < n_accepted[..., None], padded, more), n_accepted


def _propose(
    draft: Draft, rules: Rules, state: State, cache: KVCache, key: PRNGKey
) -> tuple[Int[Array, "*batch n_draft"], Float[Array, "*batch n_draft vocab"], KVCache]:
    """Tokens that the draft draws one after the other, the logits that it drew each from, and its
    cache, with all but the last of them."""

    def run(tokens: Tokens, carry: tuple, key: PRNGKey) -> tuple[tuple, tuple]:
        cache, seen = carry
        hidden, cache = draft.model.hidden(tokens, cache=cache)
        logits = real_logits(draft.model, hidden[..., -1:, :])[..., 0, :]
        logits = rules.sampler.penalized(logits, seen)
        if rules.sampler.temperature is None:
            token = argmax(logits)
        else:
            logits = rules.sampler.filtered(logits)
            token = draw(logits, key)
        token = token.astype(jnp.int32)
        seen = None if seen is None else with_token(seen, token)
        return (cache, seen), (token, logits)

    keys = jax.random.split(key, draft.n_token)
    last_two = lax.dynamic_slice_in_dim(state.tokens, state.length - 2, 2, axis=-1)
    carry, first = run(last_two, (cache, state.seen), keys[0])

    def step(carry: tuple, key: PRNGKey) -> tuple[tuple, tuple]:
        carry, token = carry
        carry, made = run(token[..., None], carry, key)
        return (carry, made[0]), made

    ((cache, _), _), others = lax.scan(step, (carry, first[0]), keys[1:])
    tokens, logits = (jnp.concatenate([a[None], b]) for a, b in zip(first, others, strict=True))
    return jnp.moveaxis(tokens, 0, -1), jnp.moveaxis(logits, 0, -2), cache


def _seen_before(
    seen: Bool[Array, "*batch vocab"] | None, drafted: Int[Array, "*batch n_draft"]
) -> Bool[Array, "*batch n_checked vocab"] | None:
    """What has been seen before each draft, and after the last one."""
    if seen is None:
        return None
    at = [seen]
    for i in range(drafted.shape[-1]):
        at.append(with_token(at[-1], drafted[..., i]))
    return jnp.stack(at, axis=-2)


def _until_stop(
    rules: Rules,
    state: State,
    tokens: Int[Array, "*batch n_checked"],
    n_accepted: Int[Array, "*batch"],
    longest: Int[Array, ""],
) -> tuple[Int[Array, "*batch n_checked"], Bool[Array, "*batch n_checked"], Int[Array, ""]]:
    """Rows that repeat their stop token, whether they are done after each token, and how many
    tokens all rows have. A row that is done holds no other back."""
    token = lax.dynamic_index_in_dim(state.tokens, state.length - 1, axis=-1, keepdims=False)
    done, all_tokens, all_done = state.done, [], []
    for i in range(tokens.shape[-1]):
        token = jnp.where(done, token, tokens[..., i])
        done = done | jnp.isin(token, rules.stop)
        all_tokens.append(token)
        all_done.append(done)
    done = jnp.stack(all_done, axis=-1)
    ended = jnp.take_along_axis(done, n_accepted[..., None], axis=-1)[..., 0]
    most = jnp.where(ended, tokens.shape[-1], n_accepted + 1)
    n = jnp.minimum(jnp.min(most), longest - state.length)
    return jnp.stack(all_tokens, axis=-1), done, n


def _n_leading(true: Bool[Array, "*batch n"]) -> Int[Array, "*batch"]:
    """How many are true before the first that is not."""
    return jnp.sum(jnp.cumprod(true.astype(jnp.int32), axis=-1), axis=-1, dtype=jnp.int32)
