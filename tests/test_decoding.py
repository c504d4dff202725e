"""Every way of decoding says what the uncached model says, in every family; and what else it tells.

The models are those of tests/fixtures, in float32, and greedy.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.monitoring
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, lively, random_tokens

from eqx_gpt import (
    GPT,
    Draft,
    generate,
    generate_with_logprobs,
    pad_prompts,
    stream,
)
from eqx_gpt.inference import lay_out
from weights import from_pretrained
from weights.families import FAMILIES

FIXTURES = Path(__file__).parent / "fixtures"

pytestmark = pytest.mark.usefixtures("quick_compilation")

logits = eqx.filter_jit(lambda model, tokens: model(tokens))


def uncached(
    model: GPT, prompt: list[int], n_new: int, penalty: float = 1.0
) -> tuple[list[int], list[float]]:
    """The likeliest token, again and again, from the whole window; and its log-probability."""
    block_size, tokens, logprobs = model.config.block_size, list(prompt), []
    for _ in range(n_new):
        window = tokens[-block_size:]
        padded = np.array(window + [0] * (block_size - len(window)), np.int32)
        row = np.asarray(logits(model, padded), np.float64)[len(window) - 1]
        row = row[: model.config.real_vocab_size]
        seen = np.isin(np.arange(len(row)), tokens)
        punished = np.where(seen, np.where(row < 0, row * penalty, row / penalty), row)
        tokens.append(int(punished.argmax()))
        logprobs.append(float(np.log(reference.softmax(row)[tokens[-1]])))
    return tokens, logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_says_the_same(family: str) -> None:
    """Cached, as a batch of padded prompts, in chunks; and with a draft. Of one prompt by itself,
    `tests/test_families.py` asks transformers."""
    model = lay_out(from_pretrained(FIXTURES / family))
    n_new, n_vocab = 11, model.config.real_vocab_size
    rows = np.random.default_rng(3).integers(0, n_vocab, (3, 8)).tolist()
    prompts = [rows[0][:5], rows[1], rows[2][:7]]
    expected = np.array([uncached(model, prompt, n_new)[0][-n_new:] for prompt in prompts])
    assert len(np.unique(expected)) > 3  # otherwise it would prove little

    padded, lengths = pad_prompts(prompts, fill=1)
    settings = {"lengths": lengths, "temperature": 0.0}
    chunks = list(stream(model, padded, n_new, chunk=4, **settings))
    assert [x.shape[1] for x in chunks] == [4, 4, 3]
    assert np.array_equal(np.concatenate(chunks, axis=1), expected)

    # Its own first layer: right now and then.
    config = dataclasses.replace(model.config, n_layer=1, layers=model.config.layers[:1])
    draft = Draft(GPT(model.wte, model.wpe, model.blocks[:1], model.norm, model.head, config), 2)
    found = generate(model, padded, n_new, draft=draft, **settings)
    assert np.array_equal(np.asarray(found)[:, -n_new:], expected)


@pytest.mark.parametrize("penalty", [0.7, 1.5])
def test_penalty_and_logprobs(penalty: float) -> None:
    """Of rows with unlike prompts, of which some tokens are padding; beyond the block size too."""
    model = lively(ARCHITECTURES["no_bias"])
    rows = random_tokens(model.config, 2, 9)
    prompts = [rows[0, :4].tolist(), rows[1].tolist()]
    padded, lengths = pad_prompts(prompts, fill=int(uncached(model, prompts[0], 1)[0][-1]))
    settings = {"temperature": 0.0, "repetition_penalty": penalty, "lengths": lengths}
    found = generate_with_logprobs(model, padded, 17, **settings)
    assert found.passes == 17
    for i, prompt in enumerate(prompts):
        tokens, logprobs = uncached(model, prompt, 17, penalty)
        assert found.tokens[i, 9 - len(prompt) :].tolist() == tokens
        assert tokens != uncached(model, prompt, 17)[0]
        assert np.abs(np.asarray(found.logprobs[i]) - logprobs).max() < 1e-5
    chunks = list(stream(model, padded, 17, chunk=6, **settings))
    assert np.array_equal(np.concatenate(chunks, axis=1), found.tokens[:, 9:])


def test_logprobs_after_a_stop_token() -> None:
    """Of what a row only repeats, 0; the others' are those without a stop token."""
    model = lively(ARCHITECTURES["gpt2"])
    prompt, key = random_tokens(model.config, 2, 4), jax.random.key(1)
    free = generate_with_logprobs(model, prompt, 7, key=key, temperature=1.5)
    stop = [int(free.tokens[0, 4 + 2])]
    found = generate_with_logprobs(model, prompt, 7, key=key, temperature=1.5, stop=stop)
    assert np.array_equal(found.tokens, generate(model, prompt, 7, key=key, temperature=1.5,
                                                 stop=stop))  # fmt: skip
    repeated = np.cumsum(np.asarray(found.tokens)[:, 4:] == stop[0], axis=1) > 1
    assert repeated[0, 3:].all()
    assert np.array_equal(found.logprobs, np.where(repeated, 0, free.logprobs))
    nothing = generate_with_logprobs(model, prompt, 0, temperature=0.0)
    assert nothing.logprobs.shape == (2, 0)
    assert nothing.passes == 0


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan"), float("inf")])
def test_refused_penalty(penalty: float) -> None:
    model = lively(ARCHITECTURES["gpt2"])
    with pytest.raises(ValueError, match=f"repetition_penalty must be above 0, got {penalty}"):
        generate(model, [1], 3, temperature=0.0, repetition_penalty=penalty)


# What is compiled


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The compilations that take place."""
    events: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_prompts_of_similar_lengths_share_their_programs(compiled: list[str]) -> None:
    model = lively(ARCHITECTURES["gpt2"])
    prompt = random_tokens(model.config, 8).tolist()
    generate(model, prompt, 4, temperature=0.0)
    assert compiled
    compiled.clear()
    for n in (5, 6, 7):
        generate(model, prompt[:n], 4, temperature=0.0)
        list(stream(model, prompt[:n], 4, temperature=0.0, chunk=2))
    assert compiled == []


def test_a_prompt_that_fills_the_context_needs_no_cached_loop(compiled: list[str]) -> None:
    """Nor does a single new token: the programs of these are the prompt's and the window's."""
    model = lay_out(lively(ARCHITECTURES["llama"]))
    prompt = random_tokens(model.config, model.config.block_size)
    generate(model, prompt, 1, temperature=0.0)
    compiled.clear()
    generate(model, prompt, 3, temperature=0.0)
    assert len(compiled) == 1  # the sliding window


def test_laying_out_keeps_the_numbers() -> None:
    model = lively(ARCHITECTURES["gemma3"])
    laid_out = lay_out(model)
    assert lay_out(laid_out) is laid_out
    tokens = random_tokens(model.config, 2, 7)
    assert len(laid_out.blocks) == model.config.n_layer
    assert np.abs(logits(laid_out, tokens) - logits(model, tokens)).max() < 1e-5
