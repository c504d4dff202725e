"""Several documents in one sequence: each is computed as if it were alone."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, lively, random_tokens

from eqx_gpt import KVCache, for_inference
from eqx_gpt.ops import blocked_attention as blocked_attention_module
from eqx_gpt.ops.attention import _plain_attention, causal_attention
from eqx_gpt.tree import cast, named_arrays

SEQ, WIDTH = 11, 7
LENGTHS = ((4, 1, 6), (11,), (2, 9))  # of the documents in each row

pytestmark = pytest.mark.usefixtures("quick_compilation")


def starts_of(rows: tuple[tuple[int, ...], ...]) -> jax.Array:
    starts = [np.repeat(np.cumsum([0, *lengths[:-1]]), lengths) for lengths in rows]
    return jnp.asarray(np.stack(starts), jnp.int32)


def cut(x: np.ndarray, lengths: tuple[int, ...]) -> list[np.ndarray]:
    return np.split(np.asarray(x, np.float64), np.cumsum(lengths)[:-1])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def f32(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def in_blocks(q, k, v, starts, **options):
    return causal_attention(q, k, v, starts=starts, **options)


def plainly(q, k, v, starts, window=None, scale=WIDTH**-0.5, softcap=None):
    return _plain_attention(q, k, v, starts, None, window, scale, softcap, 0.0)


@pytest.mark.parametrize("attend", [in_blocks, plainly])
@pytest.mark.parametrize("block", [256, 3], ids=["one block", "blocks of 3"])
@pytest.mark.parametrize(("head", "kv_head"), [(3, 3), (6, 2)])
def test_attention_and_its_gradients(attend, block, head, kv_head, monkeypatch):
    monkeypatch.setattr(blocked_attention_module, "_block_size", lambda seq: block)
    monkeypatch.setattr(blocked_attention_module, "_SCORES", 1)  # one key-value head at a time
    q, g = normal(0, 3, SEQ, head, WIDTH), normal(3, 3, SEQ, head, WIDTH)
    k, v = normal(1, 3, SEQ, kv_head, WIDTH), normal(2, 3, SEQ, kv_head, WIDTH)

    @jax.jit
    def run(q, k, v, g, starts):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, starts), q, k, v)
        return out, *pull(g)

    found = run(*f32(q, k, v, g), starts_of(LENGTHS))
    for row, lengths in enumerate(LENGTHS):
        alone = [
            (reference.attention(*x[:3]), *reference.attention_gradients(*x))
            for x in zip(*(cut(x[row], lengths) for x in (q, k, v, g)), strict=True)
        ]
        for x, expected in zip(found, map(np.concatenate, zip(*alone, strict=True)), strict=True):
            assert np.abs(x[row] - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("attend", [in_blocks, plainly])
@pytest.mark.parametrize(
    "options", [{"window": 2}, {"window": 4, "scale": 1.0}, {"scale": 0.7, "softcap": 0.5}], ids=str
)
def test_attention_with_a_window_a_scale_and_a_soft_cap(attend, options, monkeypatch):
    """Its gradients against differences along random directions in float64."""
    monkeypatch.setattr(blocked_attention_module, "_block_size", lambda seq: 3)
    inputs = [normal(i, SEQ, head, WIDTH) for i, head in enumerate((6, 2, 2))]
    lengths, g = LENGTHS[0], normal(3, SEQ, 6, WIDTH)

    def alone(*inputs):
        parts = zip(*(cut(x, lengths) for x in inputs), strict=True)
        return np.concatenate([reference.attention(*part, **options) for part in parts])

    run = partial(attend, starts=starts_of((lengths,))[0], **options)

    @jax.jit
    def out_and_gradients(g, *inputs):
        out, pull = jax.vjp(run, *inputs)
        return out, pull(g)

    out, gradients = out_and_gradients(*f32(g, *inputs))
    expected = alone(*inputs)
    assert np.abs(out - expected).max() <= 2e-6 * np.abs(expected).max()
    for i, gradient in enumerate(gradients):
        direction = normal(4 + i, *gradient.shape)
        ahead, behind = (
            alone(*(x + h * direction if j == i else x for j, x in enumerate(inputs)))
            for h in (1e-5, -1e-5)
        )
        slope = np.sum(g * (ahead - behind)) / 2e-5
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.sum(np.asarray(gradient, np.float64) * direction) - slope) <= 1e-5 * size


def test_dropout_lets_no_document_see_another():
    q, k, v = f32(*(normal(i, SEQ, 3, WIDTH) for i in range(3)))
    starts = starts_of(LENGTHS)[0]
    run = partial(causal_attention, dropout_rate=0.3, key=jax.random.key(0), starts=starts)
    reached = np.abs(jax.jacrev(lambda v: run(q, k, v).sum((1, 2)))(v)).max((2, 3)) > 0
    same = starts[:, None] == starts[None, :]
    assert not (reached & ~np.tril(same)).any()
    assert reached[np.tril(same)].mean() > 0.5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_every_architecture(name):
    """Positions, learned and rotary, count from the beginning of each document."""
    model = lively(ARCHITECTURES[name])
    lengths = (4, 1, 5), (2, 8)
    tokens, starts = random_tokens(model.config, 2, 10), starts_of(lengths)
    found = eqx.filter_jit(lambda m: m(tokens, starts=starts))(model)
    for row, of_row in enumerate(lengths):
        documents = np.split(np.asarray(tokens[row]), np.cumsum(of_row)[:-1])
        expected = np.concatenate(
            [reference.gpt(model.config, named_arrays(model), x) for x in documents]
        )
        error = np.linalg.norm(found[row] - expected)
        assert error < 2e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_gradients_are_those_of_each_document_alone(name):
    config = dataclasses.replace(ARCHITECTURES[name], remat="block")
    model = lively(config)
    lengths = (3, 5)
    tokens, starts = random_tokens(config, 8), starts_of((lengths,))[0]
    weights = jnp.asarray(normal(0, 8, config.vocab_size), jnp.float32)

    @eqx.filter_grad
    def together(model):
        return jnp.sum(model(tokens, starts=starts) * weights)

    @eqx.filter_grad
    def alone(model):
        parts = [model(x) for x in jnp.split(tokens, [3])]
        return jnp.sum(jnp.concatenate(parts) * weights)

    found, expected = (named_arrays(eqx.filter_jit(grad)(model)) for grad in (together, alone))
    for key, x in expected.items():
        assert np.linalg.norm(found[key] - x) <= 1e-5 * np.linalg.norm(x), key


def test_a_model_laid_out_for_decoding_takes_documents_too():
    model = lively(ARCHITECTURES["llama"])
    tokens, starts = random_tokens(model.config, 3, SEQ), starts_of(LENGTHS)
    expected = cast(model, jnp.bfloat16)(tokens, starts=starts)
    found = for_inference(model)(tokens, starts=starts)
    assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)
    assert np.linalg.norm(found - for_inference(model)(tokens)) > 0.1 * np.linalg.norm(found)


def test_what_is_refused():
    model = lively(ARCHITECTURES["gpt2"])
    tokens = jnp.asarray(random_tokens(model.config, 2, SEQ))
    with pytest.raises(ValueError, match=r"shape \(1, 11\) do not fit tokens of shape \(2, 11\)"):
        model(tokens, starts=starts_of(LENGTHS[:1]))
    cache = KVCache.init(model.config, (2,), SEQ)
    with pytest.raises(ValueError, match="cache or starts"):
        model.hidden(tokens, cache=cache, starts=starts_of(LENGTHS[:2]))
