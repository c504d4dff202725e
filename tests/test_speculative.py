"""Speculative decoding: the model's own tokens when greedy, its own distribution when sampling."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, lively, random_tokens

from eqx_gpt import (
    GPT,
    Draft,
    GPTConfig,
    generate,
    generate_with_logprobs,
    pad_prompts,
    sampling,
    stream,
)
from eqx_gpt.sampling import Sampler
from eqx_gpt.speculative import verify

pytestmark = pytest.mark.usefixtures("quick_compilation")


def perturbed(model: GPT, size: float) -> GPT:
    """A draft that is often right, and often not."""

    def noisy(x: jax.Array) -> jax.Array:
        noise = np.random.default_rng(x.size).standard_normal(x.shape)
        return x + jnp.asarray(size * noise, x.dtype)

    return jax.tree.map(noisy, model)


# Greedy


@pytest.mark.parametrize("n_token", [1, 3])
def test_greedy_is_what_the_model_says(n_token: int) -> None:
    """Row by row, far enough for the window to slide; in fewer passes than tokens."""
    model = lively(ARCHITECTURES["gpt2"])
    prompt = random_tokens(model.config, 5, 3)
    passes = {}
    for size in (0.0, 0.03, 3.0):
        draft, passes[size] = Draft(perturbed(model, size), n_token), 0
        for row in prompt:
            expected = generate(model, row, 15, temperature=0.0)
            found = generate_with_logprobs(model, row, 15, temperature=0.0, draft=draft)
            assert np.array_equal(found.tokens, expected)
            passes[size] += int(found.passes)
    # One for the prompt; then rounds of n_token + 1 while there is room for one in 13 positions,
    # then single tokens.
    full = {1: 1 + 5 + 4, 3: 1 + 2 + 6}[n_token]
    assert passes[0.0] == 5 * full
    assert passes[0.0] < passes[0.03] < 5 * 15
    assert passes[3.0] > 5 * 13


def test_greedy_with_penalty_padding_and_stops() -> None:
    """Rows of unlike prompts that accept unlike many tokens and stop at unlike times."""
    model = lively(dataclasses.replace(ARCHITECTURES["llama"], block_size=31))
    draft = Draft(perturbed(model, 0.02), 3)
    rows = random_tokens(model.config, 3, 9)
    tokens, lengths = pad_prompts([rows[0, :2].tolist(), rows[1].tolist(), rows[2, :5].tolist()])
    settings = {"lengths": lengths, "temperature": 0.0, "repetition_penalty": 1.3}
    free = np.asarray(generate(model, tokens, 13, **settings))
    assert np.array_equal(generate(model, tokens, 13, **settings, draft=draft), free)
    stop = [int(free[0, 9 + 3]), int(free[1, 9 + 8])]
    plain = generate_with_logprobs(model, tokens, 13, **settings, stop=stop)
    found = generate_with_logprobs(model, tokens, 13, **settings, stop=stop, draft=draft)
    assert np.array_equal(found.tokens, plain.tokens)
    assert np.abs(found.logprobs - plain.logprobs).max() < 1e-5
    assert found.passes < plain.passes
    chunks = list(stream(model, tokens, 13, **settings, stop=stop, draft=draft, chunk=4))
    streamed = np.concatenate(chunks, axis=1)
    assert np.array_equal(streamed, np.asarray(plain.tokens)[:, 9 : 9 + streamed.shape[1]])


@pytest.mark.parametrize(("block_size", "prompt_length"), [(7, 3), (7, 6), (7, 9), (31, 12)])
def test_contexts_of_unlike_length(block_size: int, prompt_length: int) -> None:
    """Where the draft cannot follow, the model goes on alone."""
    model = lively(ARCHITECTURES["llama"])
    config = dataclasses.replace(model.config, block_size=block_size)
    draft = Draft(perturbed(model.with_config(config), 0.03), 2)
    prompt = random_tokens(model.config, prompt_length)
    expected = generate(model, prompt, 9, temperature=0.0)
    assert np.array_equal(generate(model, prompt, 9, temperature=0.0, draft=draft), expected)


# Sampling


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Pearson's statistic and its 0.1 % bound; what is expected less than ten times is one cell."""
    rare = expected < 10
    assert (counts[expected == 0] == 0).all()
    pairs = [*zip(counts[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() > 0:
        pairs.append((counts[rare].sum(), expected[rare].sum()))
    found = sum((count - mean) ** 2 / mean for count, mean in pairs)
    n = len(pairs) - 1
    assert n >= 3
    # The quantile of Wilson and Hilferty (1931); 3.0902 is the normal one.
    return found, n * (1 - 2 / (9 * n) + 3.0902 * (2 / (9 * n)) ** 0.5) ** 3


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are drawn by groups: several here, and not one that is mostly padding."""
    monkeypatch.setattr(sampling, "_GROUP", 4)


SAMPLERS = [(1.0,), (0.7,), (1.3, 6), (1.3, None, 0.8), (1.5, None, None, 0.15)]


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_every_checked_token_has_the_models_distribution(settings: tuple) -> None:
    """Pearson's chi-square over 100,000 draws, of each token given that there is one."""
    n, n_draft, vocab = 100_000, 3, 11
    rng = np.random.default_rng(2)
    model_rows = rng.standard_normal((n_draft + 1, vocab)).astype(np.float32)
    draft_rows = model_rows[:-1] + 0.7 * rng.standard_normal((n_draft, vocab)).astype(np.float32)
    sampler = Sampler.init(*settings)
    proposal = jnp.broadcast_to(sampler.filtered(jnp.asarray(draft_rows)), (n, n_draft, vocab))
    key_draft, key_verify = jax.random.split(jax.random.key(0))
    drafted = jax.random.categorical(key_draft, proposal, axis=-1).astype(jnp.int32)
    checked = jnp.broadcast_to(jnp.asarray(model_rows), (n, n_draft + 1, vocab))
    tokens, n_accepted = verify(sampler, checked, proposal, drafted, key_verify)
    tokens, n_accepted = np.asarray(tokens), np.asarray(n_accepted)
    accepted = np.arange(n_draft) < n_accepted[:, None]
    assert np.array_equal(tokens[:, :-1][accepted], np.asarray(drafted)[accepted])
    kept = np.asarray(sampler.filtered(jnp.asarray(model_rows))) > -np.inf
    for i in range(n_draft + 1):
        scaled = np.where(kept[i], model_rows[i].astype(np.float64) / settings[0], -np.inf)
        given = tokens[n_accepted >= i, i]
        assert len(given) > n / 50
        expected = len(given) * reference.softmax(scaled)
        found, bound = chi_square(np.bincount(given, minlength=vocab), expected)
        assert found < bound, i


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("batch", [1, 2])
def test_sequences_have_the_models_distribution(batch: int) -> None:
    """Pearson's chi-square over 100,000 sequences of three tokens after a first one, against the
    probabilities of the uncached model; also where two rows advance together."""
    n, n_new, vocab = 100_000, 4, 5
    config = GPTConfig(n_layer=1, n_head=1, n_embd=6, block_size=13, vocab_size=vocab)
    model = jax.tree.map(lambda x: 2 * x, lively(config))
    draft = Draft(perturbed(model, 0.3), 2)
    prompt = np.array([3, 1], np.int32)
    rows = np.tile(prompt, (batch, 1))

    def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = generate_with_logprobs(model, rows, n_new, key=key, temperature=1.2, draft=draft)
        return found.tokens[:, 2:], found.passes

    keys = jax.random.split(jax.random.key(7), n // batch)
    tokens, passes = jax.jit(jax.vmap(sample))(keys)
    assert 2.2 < np.mean(passes) < 3.6  # neither always accepted nor never

    texts = np.array(list(itertools.product(range(vocab), repeat=n_new)))
    logits = np.asarray(model(np.concatenate([np.tile(prompt, (len(texts), 1)), texts], 1)))
    p = reference.softmax(logits[:, 1:-1].astype(np.float64) / 1.2)
    p = np.take_along_axis(p, texts[..., None], axis=-1)[..., 0].prod(-1)
    place = vocab ** np.arange(n_new)[::-1]
    counts = np.bincount(np.asarray(tokens).reshape(-1, n_new) @ place, minlength=len(texts))
    found, bound = chi_square(counts, n * p)
    assert found < bound


# Refused


def test_refused() -> None:
    model = lively(ARCHITECTURES["gpt2"])
    other = lively(ARCHITECTURES["gptj"])
    with pytest.raises(ValueError, match="the draft has 37 tokens, the model 31: both need"):
        generate(model, [1], 3, temperature=0.0, draft=Draft(other))
    with pytest.raises(ValueError, match="n_token of a Draft must be at least 1, got 0"):
        Draft(model, 0)


def test_padding_of_the_vocabulary_does_not_matter() -> None:
    """A draft whose table has other padding proposes real tokens alone."""
    model = lively(ARCHITECTURES["gpt2"])
    wider = GPT.init(
        dataclasses.replace(model.config, vocab_size=47, n_token=31), key=jax.random.key(0)
    )
    draft = Draft(eqx.tree_at(lambda m: m.blocks, wider, model.blocks), 2)
    expected = generate(model, [1, 2], 9, temperature=0.0)
    assert np.array_equal(generate(model, [1, 2], 9, temperature=0.0, draft=draft), expected)
