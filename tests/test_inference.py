"""Decoding as it is meant to be fast: batches of unequal prompts, streams, weights in int8."""

import re
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, lively, random_tokens

from eqx_gpt import (
    GPT,
    GPTConfig,
    KVCache,
    cast,
    count_params,
    decoding,
    for_inference,
    generate,
    pad_prompts,
    stream,
)
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.ops.matmul import linear
from eqx_gpt.sampling import Sampler
from eqx_gpt.tree import named_arrays


@pytest.fixture
def quick(quick_compilation: None) -> None:
    """For all but the test that reads what the optimising compiler made."""


# Prompts of different lengths


@pytest.mark.usefixtures("quick")
# Learned positions, with an offset, rope, windows, layers of two kinds, no positions.
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "gpt_neo", "gemma3", "smollm3"])
def test_padded_prompts_continue_as_each_alone(name: str) -> None:
    """Greedily and in float32; far enough for the window of the longest to slide."""
    model = lively(ARCHITECTURES[name])
    longest, n_new = model.config.block_size - 3, 7
    rows = random_tokens(model.config, 3, longest)
    prompts = [rows[0, :2].tolist(), rows[1].tolist(), rows[2, :5].tolist()]
    tokens, lengths = pad_prompts(prompts, fill=1)
    found = np.asarray(generate(model, tokens, n_new, lengths=lengths, temperature=0.0))
    for row, prompt in zip(found, prompts, strict=True):
        alone = np.asarray(generate(model, prompt, n_new, temperature=0.0))
        assert np.array_equal(row[longest - len(prompt) :], alone)


def test_pad_prompts() -> None:
    tokens, lengths = pad_prompts([[5], [7, 8, 9]], fill=2)
    assert tokens.tolist() == [[2, 2, 5], [7, 8, 9]]
    assert lengths.tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"at least one token each, got lengths \[1, 0\]"):
        pad_prompts([[5], []])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1], r"lengths have shape \(1,\), expected one a row: \(2,\)"),
        ([0, 3], "lengths must be 1 to 3, got 0 to 3"),
        ([1, 4], "lengths must be 1 to 3, got 1 to 4"),
    ],
)
def test_refused_lengths(lengths: list[int], message: str) -> None:
    model = lively(ARCHITECTURES["gpt2"])
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2, 3]] * 2, 3, lengths=lengths, temperature=0.0)


# Streams


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_gives_what_generate_gives(temperature: float) -> None:
    """Also beyond the block size, and no more once every row has stopped."""
    model, key = lively(ARCHITECTURES["gpt2"]), jax.random.key(0)
    prompt = random_tokens(model.config, 2, 5)
    settings = {"key": key, "temperature": temperature}
    expected = np.asarray(generate(model, prompt, 17, **settings))[:, 5:]
    chunks = list(stream(model, prompt, 17, chunk=5, **settings))
    assert [x.shape[1] for x in chunks] == [5, 5, 5, 2]
    assert np.array_equal(np.concatenate(chunks, axis=1), expected)

    stop = [int(token) for token in expected[:, 6]]
    expected = np.asarray(generate(model, prompt, 17, stop=stop, **settings))[:, 5:]
    stopped = np.concatenate(list(stream(model, prompt, 17, chunk=5, stop=stop, **settings)), 1)
    assert stopped.shape[1] <= 7
    assert np.array_equal(stopped, expected[:, : stopped.shape[1]])


# Smaller numbers


def test_int8_is_within_half_a_step() -> None:
    weight = np.random.default_rng(0).standard_normal((11, 37)).astype(np.float32)
    weight[3] = 0
    found = Int8.quantize(jnp.asarray(weight))
    exact = np.asarray(found.values, np.float64) * np.asarray(found.scale, np.float64)[:, None]
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(exact - weight) <= step * (0.5 + 1e-5)).all()
    assert np.abs(found.values).max() == 127


def dequantized(model: GPT) -> dict[str, np.ndarray]:
    """The arrays of `model`, laid out for inference, as those of an ordinary one, in float64."""
    ordinary: dict[str, np.ndarray] = {}
    for name in named_arrays(eqx.filter_eval_shape(GPT.init, model.config, key=jax.random.key(0))):
        first, *rest = name.split(".")
        parts = []
        for owner in model.blocks if first == "blocks" else [getattr(model, first)]:
            value = owner
            for part in rest:
                value = getattr(value, part)
            if isinstance(value, Int8):
                value = np.asarray(value.values, np.float64) * np.float64(value.scale)[:, None]
            parts.append(np.asarray(value, np.float64))
        ordinary[name] = np.stack(parts) if first == "blocks" else parts[0]
    return ordinary


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_int8_computes_with_its_rounded_weights(name: str) -> None:
    """In float32, against float64; and in bfloat16 it is near that."""
    original = lively(ARCHITECTURES[name])
    model = for_inference(original, "int8")
    assert count_params(model) == count_params(original)
    tokens = random_tokens(model.config, 7)
    expected = reference.gpt(model.config, dequantized(cast(model, jnp.float32)), tokens)
    norm = np.linalg.norm(expected)
    found = eqx.filter_jit(lambda model, tokens: model(tokens))
    exact = np.asarray(found(cast(model, jnp.float32), tokens), np.float64)
    assert np.linalg.norm(exact - expected) < 5e-6 * norm
    rough = np.asarray(found(model, tokens), np.float64)
    assert np.linalg.norm(rough - expected) < 8 * 2.0**-8 * norm


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("dtype", "error"), [(jnp.bfloat16, 2.0**-16), (jnp.float32, 2.0**-24)])
@pytest.mark.parametrize("n_row", [1, 3])
def test_few_rows_times_int8(n_row: int, dtype: jnp.dtype, error: float) -> None:
    """Each number of a row within `error` of the row's largest, and float32's own rounding."""
    rng = np.random.default_rng(0)
    weight = Int8.quantize(jnp.asarray(rng.standard_normal((23, 1000)), jnp.float32))
    x = jnp.asarray(rng.standard_normal((n_row, 1000)) ** 5, dtype)  # a few large, many small
    x = x.at[0].set(0) if n_row > 1 else x
    found = np.asarray(jax.jit(linear, static_argnums=3)(x, weight, None, jnp.float32), np.float64)
    x, scale = np.asarray(x, np.float64), np.asarray(weight.scale, np.float64)
    exact = np.asarray(weight.values, np.float64) * scale[:, None]
    off = np.abs(x).max(axis=1, keepdims=True) * np.abs(exact).sum(axis=1) * error
    off += np.abs(x) @ np.abs(exact).T * 4 * 2.0**-24
    assert (np.abs(found - x @ exact.T) <= off).all()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("n_row", [3, 67])  # in digits, and converted
def test_gradient_through_int8_is_that_of_its_numbers(n_row: int) -> None:
    weight = Int8.quantize(jax.random.normal(jax.random.key(0), (23, 17)))
    x, g = (jax.random.normal(jax.random.key(i), (n_row, n)) for i, n in ((1, 17), (2, 23)))
    _, pull = jax.vjp(lambda x: linear(x, weight), x)
    numbers = np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)[:, None]
    np.testing.assert_allclose(pull(g)[0], np.asarray(g, np.float64) @ numbers, rtol=0, atol=2e-5)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_cached_equals_uncached(quantize: str | None) -> None:
    model = cast(for_inference(lively(ARCHITECTURES["llama"]), quantize), jnp.float32)
    tokens = random_tokens(model.config, 2, 7)
    cache, parts = KVCache.init(model.config, (2,), 13), []
    extend = eqx.filter_jit(lambda model, tokens, cache: model.extend(tokens, cache))
    for first, last in [(0, 4), (4, 5), (5, 7)]:
        part, cache = extend(model, tokens[:, first:last], cache)
        parts.append(part)
    expected = np.asarray(model(tokens))
    assert np.abs(np.concatenate(parts, 1) - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_with_config(quantize: str | None) -> None:
    """Of a model that is laid out: what becomes of it, and what is refused."""
    original = lively(ARCHITECTURES["llama"])
    config = replace(original.config, unroll=2, block_size=original.config.block_size - 1)
    expected = for_inference(original.with_config(config), quantize)
    found = for_inference(original, quantize).with_config(config)
    assert eqx.tree_equal(found, expected)
    biased = replace(config, attention=replace(config.attention, qkv_bias=True))
    with pytest.raises(KeyError, match=r"blocks\.0\.attention\.qkv\.bias"):
        found.with_config(biased)


def test_refused() -> None:
    model = lively(ARCHITECTURES["gpt2"])
    with pytest.raises(ValueError, match="quantize must be None or 'int8', got 'int4'"):
        for_inference(model, "int4")
    with pytest.raises(ValueError, match="laid out for inference already; give the original"):
        for_inference(for_inference(model))


# The compiled program


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU's arrangements")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_decoding_copies_neither_cache_nor_weights(quantize: str | None) -> None:
    """In the loop over tokens, and ahead of it."""
    config = GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=512, vocab_size=1024)
    model = for_inference(GPT.init(config, key=jax.random.key(0)), quantize)
    rules = decoding.Rules.init(config, Sampler.init(0.0), None)
    zero, done = jnp.zeros((), jnp.int32), jnp.zeros(1, bool)
    cache = KVCache.init(config, (1,), 512).advance(3)
    tokens = jnp.zeros((1, 512), jnp.int32)
    state = decoding.State(tokens, None, zero + 4, zero + 1, zero + 1, done, None, cache)
    lowered = decoding.decode.lower((model, rules, np.int32(64)), state)
    text = lowered.compile().compiled.as_text()  # of the wrapper that Equinox puts around it
    fused = set(re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", text))
    cached, large = 0, []
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        name = re.match(r"%([\w.\-]+)", computation)
        if name and name.group(1) in fused:
            continue  # what happens in registers
        for line in computation.splitlines():
            made = re.match(
                r"\s+(?:ROOT )?%\S+ = (\w+)\[([\d,]+)\]\S* (copy|fusion|convert)\(", line
            )
            if made and np.prod([int(n) for n in made.group(2).split(",")]) >= 256 * 256:
                if "dynamic-update-slice" in line:
                    cached += 1
                else:
                    large.append(line.strip())
    assert not large
    assert cached == 2 * config.n_layer
