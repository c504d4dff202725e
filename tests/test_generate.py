"""Decoding against loops written out here, and the distribution that a sampler draws from."""

import dataclasses
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, lively, random_tokens

from eqx_gpt import GPT, generate, generate_with_logprobs, pad_prompts, stream
from eqx_gpt.sampling import Sampler

logits = eqx.filter_jit(lambda model, tokens: model(tokens))


pytestmark = pytest.mark.usefixtures("quick_compilation")


def greedy(model: GPT, prompt: np.ndarray, n_new: int) -> np.ndarray:
    """The likeliest real token, again and again, from the whole window and no cache.

    What stands after a position cannot change it: the windows are padded to one shape.
    """
    config, tokens = model.config, prompt
    for _ in range(n_new):
        window = tokens[..., -config.block_size :]
        n = window.shape[-1]
        padding = [(0, 0)] * (tokens.ndim - 1) + [(0, config.block_size - n)]
        last = np.asarray(logits(model, np.pad(window, padding)))[..., n - 1, :]
        best = last[..., : config.real_vocab_size].argmax(-1).astype(np.int32)
        tokens = np.concatenate([tokens, best[..., None]], -1)
    return tokens


# Greedy


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches begin with room for 64 tokens, however small they are."""
    monkeypatch.setattr(sys.modules["eqx_gpt.generate"], "_SMALL_CACHE", 0)


def test_a_cache_that_grows_changes_no_token(growing: None) -> None:
    """Over rooms for 64, 128 and all tokens, and on, to where the window slides."""
    model = lively(dataclasses.replace(ARCHITECTURES["gpt2"], block_size=167))
    prompt = random_tokens(model.config, 2, 11)
    expected = greedy(model, prompt, 173)
    assert np.array_equal(generate(model, prompt, 173, temperature=0.0), expected)
    parts = list(stream(model, prompt, 173, chunk=37, temperature=0.0))
    assert np.array_equal(np.concatenate(parts, axis=-1), expected[:, 11:])


def test_a_cache_grows_with_all_that_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities, penalties, prompts of different lengths, and rows that have stopped."""
    model = lively(dataclasses.replace(ARCHITECTURES["llama"], block_size=211))
    tokens, lengths = pad_prompts([[3, 1, 4, 1, 5], [2, 7]])
    how: dict[str, Any] = {"lengths": lengths, "temperature": 0.0, "repetition_penalty": 1.3}
    whole = generate_with_logprobs(model, tokens, 151, **how)
    monkeypatch.setattr(sys.modules["eqx_gpt.generate"], "_SMALL_CACHE", 0)
    grown = generate_with_logprobs(model, tokens, 151, **how)
    assert np.array_equal(grown.tokens, whole.tokens)
    np.testing.assert_allclose(grown.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
    stop = [int(row[30]) for row in np.asarray(whole.tokens)]
    stopped = generate_with_logprobs(model, tokens, 151, stop=stop, **how)
    assert stopped.passes < 64  # the rooms behind were not gone into
    assert np.asarray(stopped.tokens)[:, -1].tolist() in ([a, b] for a in stop for b in stop)


@pytest.mark.parametrize(
    ("name", "batch", "prompt_length"),
    [
        ("gpt2", (2,), 5),
        ("gpt2", (), 13),  # block_size
        ("gpt2", (2, 3), 19),
        ("no_bias", (2,), 3),
        ("llama", (2,), 5),
        ("multi_query", (2,), 1),
        ("dropout", (2,), 11),
    ],
)
def test_greedy_equals_uncached_loop(name: str, batch: tuple[int, ...], prompt_length: int) -> None:
    """Far enough for the window to slide."""
    model = lively(ARCHITECTURES[name])
    prompt = random_tokens(model.config, *batch, prompt_length)
    n_new = max(7, model.config.block_size - prompt_length + 7)
    found = generate(model, prompt, n_new, temperature=0.0)
    expected = greedy(model, prompt, n_new)
    assert found.dtype == jnp.int32
    assert np.array_equal(found, expected)
    assert len(np.unique(expected[..., prompt_length:])) > 3  # otherwise it would prove little


@pytest.mark.parametrize("n_new", [0, 1, 13, 14])  # the window slides from 14 new ones on
def test_number_of_new_tokens(n_new: int) -> None:
    model = lively(ARCHITECTURES["gpt2"])
    found = generate(model, [7], n_new, temperature=0.0)
    assert np.array_equal(found, greedy(model, np.array([7], np.int32), n_new))


def test_padded_vocabulary_is_never_drawn() -> None:
    model = lively(ARCHITECTURES["no_bias"])
    n_token = model.config.real_vocab_size
    # Both a row and its opposite, so that at every position one of them is likeliest of all.
    row = 9 * model.wte.weight[0]
    table = model.wte.weight.at[n_token].set(row).at[n_token + 1].set(-row)
    model = eqx.tree_at(lambda m: m.wte.weight, model, table)
    prompt = random_tokens(model.config, 2, 5)
    assert (np.argmax(logits(model, prompt), -1) >= n_token).mean() > 0.5
    assert (generate(model, prompt, 20, temperature=0.0) < n_token).all()
    hot = generate(model, np.zeros((53, 1), np.int32), 23, key=jax.random.key(0), temperature=50.0)
    assert hot.max() == n_token - 1  # every real token, at this heat


# Stop tokens


def stopped(tokens: np.ndarray, prompt_length: int, stop: tuple[int, ...]) -> np.ndarray:
    """Rows of (row, token) repeat the first new token that is in `stop`."""
    tokens = tokens.copy()
    for row in tokens:
        ends = [i for i in range(prompt_length, len(row)) if row[i] in stop]
        if ends:
            row[ends[0] :] = row[ends[0]]
    return tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_repeats_its_stop_token(temperature: float) -> None:
    """Whether it stops early or in the sliding window; other rows go on unchanged."""
    model, n_prompt, n_new = lively(ARCHITECTURES["gpt2"]), 5, 20
    prompt, key = random_tokens(model.config, 3, n_prompt), jax.random.key(0)
    free = np.asarray(generate(model, prompt, n_new, key=key, temperature=temperature))
    new = free[:, n_prompt:]
    stop = (int(new[0, 2]), int(new[1, 12]))
    found = generate(model, prompt, n_new, key=key, temperature=temperature, stop=stop)
    assert np.array_equal(found, stopped(free, n_prompt, stop))


@pytest.mark.parametrize("at", [3, 13])
def test_stopping_of_every_row_ends_the_rest(at: int) -> None:
    """In the cached loop and in the sliding one; a stop token in the prompt does not stop."""
    model, n_new = lively(ARCHITECTURES["gpt2"]), 20
    prompt = random_tokens(model.config, 2, 5)
    free = np.asarray(generate(model, prompt, n_new, temperature=0.0))
    stop = tuple(int(token) for token in (*free[:, 5 + at], prompt[0, -1]))
    found = np.asarray(generate(model, prompt, n_new, temperature=0.0, stop=stop))
    assert np.array_equal(found, stopped(free, 5, stop))
    assert np.isin(found[:, -1], stop).all()


# Sampling


def test_samples_follow_their_key() -> None:
    model = lively(ARCHITECTURES["gpt2"])
    prompt = np.tile(random_tokens(model.config, 1, 5), (3, 1))
    first, again, other = (
        np.asarray(generate(model, prompt, 20, key=jax.random.key(i))) for i in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({tuple(row) for row in first}) == 3  # equal prompts, each with draws of its own


@pytest.mark.parametrize(
    "settings", [(1e-4, None, None, None), (1.0, 1, None, None), (1.0, None, 1e-6, None),
                 (1.0, None, None, 1.0), (0.0, 5, 0.9, 0.1)], ids=str,
)  # fmt: skip
def test_a_single_candidate_is_the_likeliest(settings: tuple) -> None:
    rows = np.random.default_rng(0).standard_normal((2, 53, 37)).astype(np.float32)
    drawn = Sampler.init(*settings)(jnp.asarray(rows), jax.random.key(0))
    assert np.array_equal(drawn, rows.argmax(-1))


def kept_by(sampler: Sampler, rows: np.ndarray) -> np.ndarray:
    """What can still be drawn once the sampler has filtered, as a mask."""
    return np.asarray(sampler.filtered(jnp.asarray(rows))) > -np.inf


def kept_by_definition(
    row: np.ndarray,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> np.ndarray:
    """One row, in float64. What equals the last one kept is kept as well."""
    row = row.astype(np.float64) / temperature
    kept = np.ones(len(row), bool)
    if top_k is not None:
        kept &= row >= sorted(row)[-min(top_k, len(row))]
    if top_p is not None:
        p = reference.softmax(np.where(kept, row, -np.inf))
        total, least = 0.0, 0.0
        for x in sorted(p, reverse=True):
            total, least = total + x, x
            if total >= top_p:
                break
        kept &= p >= least
    if min_p is not None:
        p = reference.softmax(np.where(kept, row, -np.inf))
        kept &= p >= min_p * p.max()
    return kept


@pytest.mark.parametrize(
    "settings",
    [
        (1.0, None, None, None),
        (1.0, 1, None, None),
        (0.7, 5, None, None),
        (1.0, 37, None, None),
        (1.0, 100, None, None),
        (1.0, None, 0.01, None),
        (1.0, None, 0.5, None),
        (2.0, None, 0.9, None),
        (1.0, None, 0.999, None),
        (1.0, None, None, 0.0),
        (1.0, None, None, 0.05),
        (0.5, None, None, 0.3),
        (1.3, 11, 0.8, 0.1),
        (1.3, 11, 0.9, None),
        (1.3, None, 0.9, 0.2),
    ],
    ids=str,
)
def test_filters_keep_exactly_the_right_tokens(settings: tuple) -> None:
    rows = 3 * np.random.default_rng(0).standard_normal((101, 37)).astype(np.float32)
    found = kept_by(Sampler.init(*settings), rows)
    expected = np.stack([kept_by_definition(row, *settings) for row in rows])
    assert np.array_equal(found, expected)
    assert (expected.all(axis=-1).all()) == (settings in [(1.0, None, None, None),
        (1.0, 37, None, None), (1.0, 100, None, None), (1.0, None, None, 0.0)])  # fmt: skip


@pytest.mark.parametrize("settings", [(1.0, 3, None, None), (1.0, None, 0.6, None)], ids=str)
def test_filters_keep_ties(settings: tuple) -> None:
    rows = np.array([[0, 4, 4, 4, 4, -1, 2], [4, 5, 0, 4, 0, 4, 4]], np.float32)
    kept = kept_by(Sampler.init(*settings), rows)
    assert kept.tolist() == (rows >= 4).tolist()


def test_top_p_of_everything_keeps_everything_likely() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 37)).astype(np.float32)
    assert kept_by(Sampler.init(1.0, None, 1.0, None), rows).all()


@pytest.mark.parametrize(
    "settings",
    [
        (1.0, None, None, None),
        (0.7, None, None, None),
        (1.7, None, None, None),
        (1.3, 5, None, None),
        (1.3, None, 0.8, None),
        (1.3, None, None, 0.2),
    ],
    ids=str,
)
def test_draws_have_the_right_distribution(settings: tuple) -> None:
    """Pearson's chi-square over 100,000 draws, at the 0.1 % level."""
    row = np.random.default_rng(1).standard_normal(11).astype(np.float32)
    kept = kept_by_definition(row, *settings)
    probability = reference.softmax(np.where(kept, row.astype(np.float64) / settings[0], -np.inf))
    n = 100_000
    draws = Sampler.init(*settings)(jnp.tile(jnp.asarray(row), (n, 1)), jax.random.key(0))
    counts = np.bincount(np.asarray(draws), minlength=11)
    assert (counts[~kept] == 0).all()
    expected = n * probability[kept]
    assert expected.min() > 100
    chi_square = np.sum((counts[kept] - expected) ** 2 / expected)
    freedom = int(kept.sum()) - 1
    assert freedom >= 4
    # The quantile of Wilson and Hilferty (1931); 3.0902 is the normal one.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < bound


# The public door


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or above, got -0.1"),
        ({"temperature": float("inf")}, "temperature must be .* got inf"),
        ({"temperature": float("nan")}, "temperature must be .* got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0; None keeps all"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0; None keeps all"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1; None keeps all"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1; None keeps all"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\], got 1.1; None keeps all"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or above, got -1"),
        ({"stop": (3, 31)}, "stop token 31 is outside 0 to 30"),
        ({"stop": (-1,)}, "stop token -1 is outside 0 to 30"),
        ({"key": None}, r"sampling needs key=jax\.random\.key\(\.\.\.\); temperature=0 is greedy"),
    ],
    ids=str,
)
def test_refused_settings(settings: dict, message: str) -> None:
    model = lively(ARCHITECTURES["gpt2"])
    with pytest.raises(ValueError, match=message):
        generate(model, [1, 2], **{"key": jax.random.key(0), **settings})


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "must be integers, got float64"),
        (3, ValueError, r"shape \(\*batch, seq\), got a scalar"),
        ([], ValueError, r"shape \(0,\) are empty"),
        ([0, 31], ValueError, "token 31 lies outside the vocabulary"),
        (np.array([2**32 + 1]), ValueError, "token 4294967297 lies outside the vocabulary"),
        ([31] + 20 * [0], ValueError, "token 31 lies outside the vocabulary"),
    ],
)
def test_refused_prompts(tokens: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(lively(ARCHITECTURES["gpt2"]), tokens, 3, temperature=0.0)
