"""The numeric kernels and the small layers against float64 NumPy."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

from eqx_gpt.config import (
    LinearScaling,
    Llama3Scaling,
    NormConfig,
    PositionConfig,
    YarnScaling,
)
from eqx_gpt.layers.linear import Embedding, Linear
from eqx_gpt.layers.norm import Norm
from eqx_gpt.layers.rope import rotate
from eqx_gpt.ops import blocked_attention as blocked_attention_module
from eqx_gpt.ops import cross_entropy as cross_entropy_module
from eqx_gpt.ops import head_tiles
from eqx_gpt.ops import normalize as normalize_module
from eqx_gpt.ops.activation import activate, activate_gated
from eqx_gpt.ops.angles import cos_and_sin
from eqx_gpt.ops.attention import causal_attention
from eqx_gpt.ops.bits import split
from eqx_gpt.ops.cached_attention import cached_attention
from eqx_gpt.ops.cross_entropy import cross_entropy
from eqx_gpt.ops.dropout import dropout, kept_by, seeds_of
from eqx_gpt.ops.exp import exp_of_negative
from eqx_gpt.ops.matmul import linear
from eqx_gpt.ops.rounding import rounded, widened

pytestmark = pytest.mark.usefixtures("quick_compilation")


BF16 = 2.0**-8  # the largest relative error of one rounding to bfloat16


def normal(seed: int, *shape: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def check(found: jax.Array, expected: np.ndarray, bound: float) -> None:
    """No element is off by more than `bound` times the largest."""
    assert found.shape == expected.shape
    assert np.abs(f64(found) - expected).max() <= bound * np.abs(expected).max()


def test_cosines_and_sines_are_those_of_float64():
    angle = jnp.concatenate([normal(0, 997) * 3, normal(1, 997) * 1e5, jnp.zeros(1)])
    exact = f64(angle)
    for found, expected in zip(
        jax.jit(cos_and_sin)(angle), (np.cos(exact), np.sin(exact)), strict=True
    ):
        np.testing.assert_allclose(f64(found), expected, rtol=0, atol=2.0**-23)


# Attention

SEQ, WIDTH = 5, 7


def attention_inputs(
    batch: tuple[int, ...], head: int, kv_head: int, cache: int, dtype: jnp.dtype = jnp.float32
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return (
        normal(0, *batch, SEQ, head, WIDTH, dtype=dtype),
        normal(1, *batch, cache, kv_head, WIDTH, dtype=dtype),
        normal(2, *batch, cache, kv_head, WIDTH, dtype=dtype),
    )


def attend_to_cache(
    q: jax.Array, k: jax.Array, v: jax.Array, *, offset: int, **options: float
) -> jax.Array:
    k, v = (jnp.swapaxes(x, -2, -3).reshape(-1, x.shape[-3], WIDTH) for x in (k, v))
    return cached_attention(q, k, v, offset=jnp.asarray(offset, jnp.int32), **options)


@pytest.mark.parametrize(("batch", "head", "kv_head"), [((), 3, 3), ((2,), 6, 2), ((2, 3), 3, 1)])
@pytest.mark.parametrize("block", [256, 2], ids=["one block", "blocks of 2"])
def test_attention_and_its_gradients(
    batch: tuple[int, ...], head: int, kv_head: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked_attention_module, "_block_size", lambda seq: block)
    monkeypatch.setattr(blocked_attention_module, "_SCORES", 1)  # one key-value head at a time
    q, k, v = attention_inputs(batch, head, kv_head, SEQ)
    g = normal(3, *q.shape)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple:
        out, pull = jax.vjp(causal_attention, q, k, v)
        return out, *pull(g)

    found = run(q, k, v, g)
    for index in np.ndindex(*batch):
        one = [f64(x[index]) for x in (q, k, v)]
        gradients = reference.attention_gradients(*one, f64(g[index]))
        for x, expected in zip(found, (reference.attention(*one), *gradients), strict=True):
            check(x[index], expected, 2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{"window": 2}, {"window": 4, "scale": 1.0}, {"scale": 0.7, "softcap": 0.5}],
    ids=str,
)
def test_gradients_of_attention_with_a_window_a_scale_and_a_soft_cap(
    options: dict, dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against differences along random directions in float64."""
    monkeypatch.setattr(blocked_attention_module, "_block_size", lambda seq: 2)
    monkeypatch.setattr(blocked_attention_module, "_SCORES", 1)
    inputs = attention_inputs((), 6, 2, SEQ, dtype)
    g = normal(3, *inputs[0].shape, dtype=dtype)
    exact = [f64(x) for x in inputs]
    _, pull = jax.vjp(lambda *x: causal_attention(*x, **options), *inputs)
    bound = 1e-5 if dtype == jnp.float32 else 2 * BF16
    for i, gradient in enumerate(pull(g)):
        direction = np.random.default_rng(4 + i).standard_normal(gradient.shape)
        ahead, behind = (
            reference.attention(*exact[:i], exact[i] + h * direction, *exact[i + 1 :], **options)
            for h in (1e-5, -1e-5)
        )
        slope = np.sum(f64(g) * (ahead - behind)) / 2e-5
        size = np.linalg.norm(f64(gradient)) * np.linalg.norm(direction)
        assert abs(np.sum(f64(gradient) * direction) - slope) <= bound * size


@pytest.mark.parametrize(
    ("batch", "head", "kv_head", "offset", "cache"),
    [
        ((), 3, 3, 0, SEQ),
        ((2, 3), 3, 1, 4, 4 + SEQ),  # multi-query, after four cached positions
        ((2,), 6, 3, 2, 11),  # the cache has room left, which nobody may see
    ],
)
def test_attention_to_a_cache(
    batch: tuple[int, ...], head: int, kv_head: int, offset: int, cache: int
) -> None:
    q, k, v = attention_inputs(batch, head, kv_head, cache)
    found = attend_to_cache(q, k, v, offset=offset)
    for index in np.ndindex(*batch):
        one = [f64(x[index]) for x in (q, k, v)]
        check(found[index], reference.attention(*one, offset), 2e-6)


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 3}, {"window": 4, "scale": 1.0}, {"scale": 0.7, "softcap": 0.5}],
    ids=str,
)
def test_attention_with_a_window_a_scale_and_a_soft_cap(options: dict, offset: int) -> None:
    q, k, v = attention_inputs((), 6, 2, offset + SEQ)
    found = attend_to_cache(q, k, v, offset=offset, **options)
    check(found, reference.attention(f64(q), f64(k), f64(v), offset, **options), 2e-6)


def test_attention_with_extreme_scores() -> None:
    q, k, v = attention_inputs((), 3, 3, SEQ)
    q, k = 100 * q, 100 * k
    check(causal_attention(q, k, v), reference.attention(f64(q), f64(k), f64(v)), 1e-3)


def test_attention_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two roundings of the result: of the softmax, and of the output."""
    monkeypatch.setattr(blocked_attention_module, "_SCORES", 1)
    q, k, v = attention_inputs((17,), 6, 2, SEQ, jnp.bfloat16)
    q = 32 * q  # scores so large that a rounding of them would show
    out = causal_attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = [reference.attention(*(f64(x[i]) for x in (q, k, v))) for i in range(17)]
    check(out, np.stack(expected), 2 * BF16)


def test_attention_dropout_scales_or_drops_each_weight() -> None:
    """Values that are the rows of the identity make the outputs the weights themselves."""
    q, k = normal(0, 101, WIDTH, 6, WIDTH), normal(1, 101, WIDTH, 2, WIDTH)
    identity = jnp.eye(WIDTH, dtype=jnp.float32)[:, None, :]
    v = jnp.broadcast_to(identity, k.shape)
    rate, key = 0.3, jax.random.key(0)
    whole = np.asarray(causal_attention(q, k, v))
    dropped = np.asarray(causal_attention(q, k, v, dropout_rate=rate, key=key))
    visible = whole > 0
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / (1 - rate), rtol=1e-5)
    n = visible.sum()
    assert abs(kept.sum() / n - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / n)
    assert not np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[..., 0, :], kept[..., 1, :])
    assert np.array_equal(causal_attention(q, k, v, dropout_rate=rate), whole)


# Dropout


def test_attention_with_dropout_in_blocks_is_the_formula_with_its_mask() -> None:
    """Three query heads share a key head."""
    seq, head, rate, window = 263, 6, 0.3, 199
    q, d = (normal(i, 2, seq, head, 5) for i in (0, 3))
    k, v = (normal(i, 2, seq, 2, 5) for i in (1, 2))
    key = jax.random.key(5)
    shape = (2, head, seq, seq)
    seeds = jnp.swapaxes(seeds_of(key, (2, seq, head)), 1, 2)[..., None]
    columns = jnp.broadcast_to(jnp.arange(seq), shape)
    kept = kept_by(jnp.broadcast_to(seeds, shape), columns, rate)
    distance = jnp.arange(seq)[:, None] - jnp.arange(seq)[None, :]
    seen = jnp.broadcast_to((distance >= 0) & (distance < window), shape)

    def formula(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(5)
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(kept, weights / (1 - rate), 0), v)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_attention(q, k, v, window=window, dropout_rate=rate, key=key)

    expected, pull_expected = jax.vjp(formula, q, k, v)
    found, pull = jax.vjp(ours, q, k, v)
    check(found, f64(expected), 1e-5)
    for a, b in zip(pull(d), pull_expected(d), strict=True):
        check(a, f64(b), 1e-5)


def test_what_is_kept_is_independent_from_number_to_number() -> None:
    rate, shape = 0.2, (1009, 1013)
    seeds = jnp.broadcast_to(seeds_of(jax.random.key(3), shape[:1])[:, None], shape)
    columns = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    kept = np.asarray(kept_by(seeds, columns, rate)).astype(np.float64) - (1 - rate)
    variance = rate * (1 - rate)
    limit = 5 * math.sqrt(variance / kept.size)  # five standard errors
    assert abs(kept.mean()) < limit
    for lag in (1, 2, 7, 64):
        for a, b in ((kept[:, lag:], kept[:, :-lag]), (kept[lag:], kept[:-lag])):
            assert abs((a * b).mean()) < limit * math.sqrt(variance) * 1.1
    for axis, n in ((0, shape[0]), (1, shape[1])):  # neither rows nor columns stand out
        assert abs(kept.mean(axis).var() / (variance / n) - 1) < 5 * math.sqrt(2 / 1009)


def test_dropout_keeps_the_mean() -> None:
    x, rate = jnp.ones((211, 101), jnp.float32), 0.3
    y = np.asarray(dropout(x, rate, jax.random.key(0)))
    assert set(np.unique(y)) == {0, np.float32(1 / (1 - rate))}
    assert abs(np.mean(y == 0) - rate) < 5 * math.sqrt(rate * (1 - rate) / y.size)
    assert not np.array_equal(y, dropout(x, rate, jax.random.key(1)))
    assert np.array_equal(dropout(x, rate, None), x)
    assert np.array_equal(dropout(x, 0.0, jax.random.key(0)), x)
    assert dropout(x.astype(jnp.bfloat16), rate, jax.random.key(0)).dtype == jnp.bfloat16


# Cross-entropy

TOKENS, D_MODEL, VOCAB = 6, 5, 11


@pytest.fixture(params=["whole", "tiles"])
def chunks_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Sets how many tokens at a time see the head, at once or by tiles of 2 of the vocabulary."""

    def set_tokens(n: int, itemsize: int = 4) -> None:
        monkeypatch.setattr(cross_entropy_module, "_CHUNK_LOGITS", n * VOCAB)
        monkeypatch.setattr(cross_entropy_module, "_TILED_CHUNK_BYTES", n * VOCAB * itemsize)
        if request.param == "tiles":  # the last overlaps the one before
            monkeypatch.setattr(head_tiles, "_TILE", 2)
            monkeypatch.setattr(head_tiles, "_MULTIPLE", 2)
        assert head_tiles.has_tiles(VOCAB) == (request.param == "tiles")

    return set_tokens


@pytest.mark.parametrize(
    ("batch", "chunk_tokens"),
    [((), 4), ((2,), 1), ((2, 3), 11), ((2, 3), 1000)],  # 4 and 11 leave a padded last chunk
)
def test_cross_entropy_and_its_gradients(
    batch: tuple[int, ...], chunk_tokens: int, chunks_of: Callable
) -> None:
    chunks_of(chunk_tokens)
    seq = TOKENS + 1
    hidden, weight = normal(0, *batch, seq, D_MODEL), normal(1, VOCAB, D_MODEL)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, (*batch, seq)), jnp.int32)
    expected, d_hidden, d_weight = reference.cross_entropy(
        f64(hidden).reshape(-1, D_MODEL), f64(weight), np.asarray(targets).ravel()
    )
    assert abs(float(cross_entropy(hidden, weight, targets)) - expected) < 1e-6 * expected

    def scaled(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        return 3 * cross_entropy(hidden, weight, targets)

    loss, grads = jax.value_and_grad(scaled, argnums=(0, 1))(hidden, weight)
    assert abs(float(loss) - 3 * expected) < 3e-6 * expected
    check(grads[0], 3 * d_hidden.reshape(hidden.shape), 2e-6)
    check(grads[1], 3 * d_weight, 2e-6)


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.3, 0.0), (0.0, 0.2), (0.01, 0.1)])
def test_cross_entropy_with_z_loss_and_label_smoothing(
    z_loss: float, smoothing: float, chunks_of: Callable
) -> None:
    chunks_of(4)
    hidden, weight = normal(0, TOKENS, D_MODEL), normal(1, VOCAB, D_MODEL)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, TOKENS), jnp.int32)
    expected, d_hidden, d_weight = reference.cross_entropy(
        f64(hidden), f64(weight), np.asarray(targets), z_loss, smoothing
    )

    def loss(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        return cross_entropy(hidden, weight, targets, None, None, None, z_loss, smoothing)

    assert abs(float(loss(hidden, weight)) - expected) < 2e-6 * expected
    found, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, weight)
    assert abs(float(found) - expected) < 2e-6 * expected
    check(grads[0], d_hidden, 2e-6)
    check(grads[1], d_weight, 2e-6)


def test_cross_entropy_of_extreme_logits(chunks_of: Callable) -> None:
    """Logits of some 10,000: `exp` of them has no float32, nor has 1 - p of a sure answer."""
    chunks_of(1000)
    hidden, weight = 100 * normal(0, TOKENS, D_MODEL), 100 * normal(1, VOCAB, D_MODEL)
    logits = f64(hidden) @ f64(weight).T
    sure = logits.argmax(-1)
    for targets in (sure, (sure + 1) % VOCAB):
        expected, d_hidden, d_weight = reference.cross_entropy(f64(hidden), f64(weight), targets)
        loss, grads = jax.value_and_grad(cross_entropy, argnums=(0, 1))(
            hidden, weight, jnp.asarray(targets, jnp.int32)
        )
        assert abs(float(loss) - expected) <= 1e-6 * np.abs(logits).max()
        assert np.abs(f64(grads[0]) - d_hidden).max() <= 1e-5 * np.abs(f64(weight)).max()
        assert np.abs(f64(grads[1]) - d_weight).max() <= 1e-5 * np.abs(f64(hidden)).max()


def test_cross_entropy_in_bfloat16(chunks_of: Callable) -> None:
    """The loss is float32 throughout; a gradient is rounded once before its product and once
    after, and errors of both signs are summed."""
    chunks_of(97, itemsize=2)
    hidden = normal(0, 3, 211, D_MODEL, dtype=jnp.bfloat16)
    weight = normal(1, VOCAB, D_MODEL, dtype=jnp.bfloat16)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, (3, 211)), jnp.int32)
    expected, d_hidden, d_weight = reference.cross_entropy(
        f64(hidden).reshape(-1, D_MODEL), f64(weight), np.asarray(targets).ravel()
    )
    loss, grads = jax.value_and_grad(cross_entropy, argnums=(0, 1))(hidden, weight, targets)
    assert loss.dtype == jnp.float32
    assert abs(float(loss) - expected) < 2e-6 * expected
    assert grads[0].dtype == grads[1].dtype == jnp.bfloat16
    check(grads[0], d_hidden.reshape(hidden.shape), 2 * BF16)
    check(grads[1], d_weight, 2 * BF16)


@pytest.mark.parametrize(
    ("dtype", "gap", "shift", "bound"),
    [(jnp.bfloat16, 6.5, 0.0, 2 * BF16), (jnp.float32, 8.5, -100.0, 2e-3)],
    ids=["bfloat16", "float32 of large logits"],
)
def test_cross_entropy_of_sure_answers(
    dtype: jnp.dtype, gap: float, shift: float, bound: float, chunks_of: Callable
) -> None:
    """Gradients are small by what each answer's probability lacks of 1, some 0.003 or 0.0005:
    of that neither bfloat16 nor, of logits of 100, a float32 logarithm has many digits."""
    chunks_of(1000)
    hidden, weight = f64(normal(0, TOKENS, D_MODEL)), normal(1, VOCAB, D_MODEL, dtype=dtype)
    best = np.sort(hidden @ f64(weight).T, axis=-1)
    hidden *= gap / (best[:, -1:] - best[:, -2:-1])  # so far is the second behind
    hidden, bias = jnp.asarray(hidden, dtype), jnp.full(VOCAB, shift, jnp.float32)
    logits = f64(hidden) @ f64(weight).T
    sure = logits.argmax(-1)
    lacking = (1 - reference.softmax(logits)[np.arange(TOKENS), sure]).max()
    assert 1 < lacking * np.exp(gap) < 3
    _, d_hidden, d_weight = reference.cross_entropy(f64(hidden), f64(weight), sure)
    _, grads = jax.value_and_grad(cross_entropy, argnums=(0, 1))(
        hidden, weight, jnp.asarray(sure, jnp.int32), bias
    )
    check(grads[0], d_hidden, bound)
    check(grads[1], d_weight, bound)


def test_cross_entropy_of_forbidden_tokens_and_of_no_token(chunks_of: Callable) -> None:
    """A bias of -inf takes tokens out, the first tile's among them; a label that is none is nan."""
    chunks_of(4)
    hidden, weight = normal(0, TOKENS, D_MODEL), normal(1, VOCAB, D_MODEL)
    targets = np.random.default_rng(2).integers(2, VOCAB, TOKENS)
    bias = jnp.zeros(VOCAB).at[:2].set(-jnp.inf)
    expected, d_hidden, d_weight = reference.cross_entropy(
        f64(hidden), f64(weight)[2:], targets - 2
    )
    loss_and_gradients = jax.value_and_grad(cross_entropy, argnums=(0, 1))
    loss, grads = loss_and_gradients(hidden, weight, jnp.asarray(targets, jnp.int32), bias)
    assert abs(float(loss) - expected) < 2e-6 * expected
    check(grads[0], d_hidden, 2e-6)
    check(grads[1][2:], d_weight, 2e-6)
    assert not np.any(grads[1][:2])
    for label in (VOCAB, -100):
        wrong = jnp.asarray(targets, jnp.int32).at[1].set(label)
        assert np.isnan(loss_and_gradients(hidden, weight, wrong, bias)[0])


def test_cross_entropy_in_tiles_as_they_are() -> None:
    """The whole vocabulary takes part, a prime number of tokens, in float32 and bfloat16."""
    n_vocab = 8209
    assert head_tiles.has_tiles(n_vocab)
    targets = np.random.default_rng(2).integers(0, n_vocab, 13)
    targets[:3] = 0, n_vocab - 1, n_vocab - 17
    for dtype, bound in ((jnp.float32, 2e-6), (jnp.bfloat16, 2 * BF16)):
        hidden, weight = normal(0, 13, D_MODEL, dtype=dtype), normal(1, n_vocab, D_MODEL)
        weight = weight.astype(dtype)
        expected, d_hidden, d_weight = reference.cross_entropy(f64(hidden), f64(weight), targets)
        loss, grads = jax.value_and_grad(cross_entropy, argnums=(0, 1))(
            hidden, weight, jnp.asarray(targets, jnp.int32)
        )
        assert abs(float(loss) - expected) < 2e-6 * expected
        check(grads[0], d_hidden, bound)
        check(grads[1], d_weight, bound)


def test_cross_entropy_under_jit_and_vmap(chunks_of: Callable) -> None:
    chunks_of(4)
    hidden, weight = normal(0, 3, TOKENS, D_MODEL), normal(1, VOCAB, D_MODEL)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, (3, TOKENS)), jnp.int32)
    grad = jax.grad(cross_entropy, argnums=(0, 1))
    mapped = jax.jit(jax.vmap(grad, in_axes=(0, None, 0)))(hidden, weight, targets)
    for i in range(3):
        _, d_hidden, d_weight = reference.cross_entropy(
            f64(hidden[i]), f64(weight), np.asarray(targets[i])
        )
        check(mapped[0][i], d_hidden, 2e-6)
        check(mapped[1][i], d_weight, 2e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_with_a_bias_and_a_soft_cap(
    softcap: float | None, chunks_of: Callable
) -> None:
    """The gradients against differences along a random direction in float64."""
    chunks_of(4)
    inputs = normal(0, TOKENS, D_MODEL), normal(1, VOCAB, D_MODEL), normal(2, VOCAB)
    targets = np.random.default_rng(3).integers(0, VOCAB, TOKENS)

    def expected(hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
        p = reference.softmax(reference.head_logits(hidden, weight, bias, softcap))
        return -float(np.log(p[np.arange(TOKENS), targets]).mean())

    def loss(hidden: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return cross_entropy(hidden, weight, jnp.asarray(targets, jnp.int32), bias, softcap)

    exact = [f64(x) for x in inputs]
    assert abs(float(loss(*inputs)) - expected(*exact)) < 1e-6
    for i, grad in enumerate(jax.grad(loss, argnums=(0, 1, 2))(*inputs)):
        direction = np.random.default_rng(4).standard_normal(grad.shape)
        plus, minus = (
            [*exact[:i], exact[i] + h * direction, *exact[i + 1 :]] for h in (1e-5, -1e-5)
        )
        slope = (expected(*plus) - expected(*minus)) / 2e-5
        assert abs(np.sum(f64(grad) * direction) - slope) < 2e-6 * np.linalg.norm(grad)


# Products


@pytest.mark.parametrize("batch", [(), (3,), (3, 5)])
def test_linear(batch: tuple[int, ...]) -> None:
    x, weight, bias = normal(0, *batch, 7), normal(1, 11, 7), normal(2, 11)
    product = f64(x) @ f64(weight).T
    check(linear(x, weight), product, 1e-6)
    check(Linear(weight, None)(x), product, 1e-6)
    check(Linear(weight, bias)(x), product + f64(bias), 1e-6)


def test_linear_in_bfloat16_accumulates_in_float32() -> None:
    x, weight = normal(0, 3, 1009, dtype=jnp.bfloat16), normal(1, 5, 1009, dtype=jnp.bfloat16)
    product = f64(x) @ f64(weight).T
    assert linear(x, weight).dtype == jnp.bfloat16
    assert linear(x, weight, dtype=jnp.float32).dtype == jnp.float32
    check(linear(x, weight), product, BF16)
    check(linear(x, weight, dtype=jnp.float32), product, 1e-5)


def test_gradients_of_linear_in_bfloat16() -> None:
    """Both ways to the gradient of the weight: a narrow output, and a wide one."""
    for n_out in (6, 222):
        x, weight = normal(0, 3, 101, 34), normal(1, n_out, 34)
        g = normal(2, 3, 101, n_out)
        x, weight, g = (a.astype(jnp.bfloat16) for a in (x, weight, g))
        _, pull = jax.vjp(linear, x, weight)
        dx, d_weight = pull(g)
        assert dx.dtype == d_weight.dtype == jnp.bfloat16
        check(dx, f64(g) @ f64(weight), BF16)
        check(d_weight, np.einsum("bto,bti->oi", f64(g), f64(x)), BF16)


@pytest.mark.parametrize("n_out", [6, 222])
def test_the_gradient_of_a_float32_weight_is_not_rounded(n_out: int) -> None:
    x, g = normal(0, 3, 101, 34, dtype=jnp.bfloat16), normal(2, 3, 101, n_out, dtype=jnp.bfloat16)

    @jax.jit
    def gradients(x: jax.Array, weight: jax.Array, bias: jax.Array, g: jax.Array) -> tuple:
        y, pull = jax.vjp(linear, x, weight, bias)
        return y, pull(g)

    weight, bias = normal(1, n_out, 34), normal(3, n_out)
    y, (dx, d_weight, d_bias) = gradients(x, weight, bias, g)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (d_weight.dtype, d_bias.dtype) == (jnp.float32, jnp.float32)
    check(y, f64(x) @ f64(weight).T + f64(bias), BF16)
    check(dx, f64(g) @ f64(weight), BF16)
    check(d_weight, np.einsum("bto,bti->oi", f64(g), f64(x)), 1e-5)
    check(d_bias, f64(g).sum((0, 1)), 1e-5)


def test_fast_exponential() -> None:
    """Under jit, where a compiler that reorders its sums would show."""
    x = -np.logspace(-6, np.log10(87), 10_007, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    fast = f64(jax.jit(lambda x: exp_of_negative(x, jnp.bfloat16))(jnp.asarray(x)))
    assert np.abs(fast / exact - 1).max() < 1.1e-4
    assert f64(exp_of_negative(jnp.asarray([-1e30, -200.0]), jnp.bfloat16)).max() < 2e-38
    check(exp_of_negative(jnp.asarray(x), jnp.float32), exact, 1e-6)


def test_the_fast_exponential_has_derivatives() -> None:
    x = jnp.asarray([-3.0, -0.5], jnp.float32)
    slope = jax.grad(lambda x: jnp.sum(exp_of_negative(x, jnp.bfloat16)))(x)
    check(slope, np.exp(f64(x)), 2e-4)


def test_rounding_is_that_of_ml_dtypes_bit_by_bit() -> None:
    """Of numbers of every kind: subnormal, infinite, half-way between two, not a number."""
    ends = np.arange(0, 2**16, 7, dtype=np.uint32)[:, None] << 16
    bits = (ends + np.asarray([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1)
    x = bits.view(np.float32)
    found = np.asarray(jax.jit(lambda x: rounded(x, jnp.bfloat16))(jnp.asarray(x)))
    with np.errstate(all="ignore"):
        expected = x.astype(ml_dtypes.bfloat16)
    real = ~np.isnan(x)
    assert (found.view(np.uint16) == expected.view(np.uint16))[real].all()
    assert np.isnan(found.astype(np.float32)[~real]).all()


def test_rounding_and_widening_have_slopes() -> None:
    x = normal(0, 7, dtype=jnp.bfloat16)
    y, pull = jax.vjp(lambda x: rounded(3 * widened(x), jnp.bfloat16), x)
    assert y.dtype == jnp.bfloat16
    (dx,) = pull(jnp.asarray([1, 2, 3, 4, 5, 6, 7], jnp.bfloat16))
    assert dx.dtype == jnp.bfloat16
    assert list(dx.astype(jnp.float32)) == [3, 6, 9, 12, 15, 18, 21]


def test_parts_have_second_derivatives() -> None:
    """Of bfloat16 they are moved as integers, which have none."""

    def cubes(x: jax.Array) -> jax.Array:
        a, b = split(x, (2, 3), 0)
        return jnp.sum(a**3) + jnp.sum(b**3)

    x = jnp.asarray([1, 2, 3, 4, 5], jnp.bfloat16)
    second = jax.grad(lambda x: jnp.sum(jax.grad(cubes)(x)))(x)
    assert list(second.astype(jnp.float32)) == [6, 12, 18, 24, 30]


def test_embedding_sums_its_gradient_in_float32() -> None:
    """4001 times the same row: bfloat16 would stop at 256."""
    for n_row in (11, 2003):  # a product, and a scatter
        table = normal(0, n_row, 2, dtype=jnp.bfloat16)
        ids = jnp.full(4001, 3, jnp.int32)
        grad = jax.grad(lambda table, ids=ids: jnp.sum(Embedding(table)(ids).astype(jnp.float32)))
        expected = np.zeros((n_row, 2))
        expected[3] = 4001
        check(grad(table), expected, BF16)


def test_a_gate_multiplies() -> None:
    gate, x = normal(0, 7), normal(1, 7)
    expected = reference.ACTIVATIONS["silu"](f64(gate)) * f64(x)
    check(activate_gated(gate, x, "silu"), expected, 1e-6)


def test_embedding_takes_rows() -> None:
    table = normal(0, 11, 7)
    ids = np.array([[3, 10, 0], [3, 3, 5]])
    assert np.array_equal(Embedding(table)(jnp.asarray(ids, jnp.int32)), np.asarray(table)[ids])


# Rotary positions


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("start", [0, 3000])
def test_rotation_is_complex_multiplication(theta: float, start: int) -> None:
    x = normal(0, 2, SEQ, 3, 10)
    positions = start + np.arange(SEQ)
    config = PositionConfig("rope", rope_theta=theta)
    out = rotate(x, jnp.asarray(positions, jnp.int32), config)
    for i in range(2):
        # A float32 angle near 3000 is off by up to 1.2e-4, half its last bit.
        check(out[i], reference.rotate(f64(x[i]), positions, config), 1e-6 if start == 0 else 2e-4)


def test_rotation_in_bfloat16_has_float32_angles() -> None:
    x = normal(0, SEQ, 3, 10, dtype=jnp.bfloat16)
    positions = 3000 + np.arange(SEQ)
    config = PositionConfig("rope")
    out = rotate(x, jnp.asarray(positions, jnp.int32), config)
    assert out.dtype == jnp.bfloat16
    check(out, reference.rotate(f64(x), positions, config), 1.1 * BF16)


ROPES = [
    PositionConfig("rope", rope_dim=6),
    PositionConfig("rope", rope_dim=6, rope_pairs="neighbours"),
    PositionConfig("rope", rope_pairs="neighbours"),
    PositionConfig("rope", rope_scaling=LinearScaling(3.0)),
    # Wavelengths from 6.3 to 25,000: below, between and above the two limits.
    PositionConfig("rope", rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 512)),
    PositionConfig("rope", rope_dim=8, rope_scaling=YarnScaling(4.0, 512)),
    PositionConfig("rope", rope_scaling=YarnScaling(4.0, 4096, 1.3, 8.0, 0.5, truncate=False)),
    # Both ends of the ramp fall on one pair.
    PositionConfig("rope", rope_scaling=YarnScaling(4.0, 6)),
]


@pytest.mark.parametrize("config", ROPES, ids=str)
def test_rotation_of_some_dimensions_and_scaled(config: PositionConfig) -> None:
    x = normal(0, SEQ, 3, 10)
    positions = 37 + np.arange(SEQ)
    out = rotate(x, jnp.asarray(positions, jnp.int32), config)
    # A float32 angle near 42 is off by up to 1.9e-6, half its last bit.
    check(out, reference.rotate(f64(x), positions, config), 4e-6)


# Norms

NORMS = [
    NormConfig(),
    NormConfig(eps=0.1),  # large enough to show where it stands
    NormConfig(bias=False),
    NormConfig("rmsnorm", eps=1e-6, bias=False),
    NormConfig("rmsnorm", eps=0.1, bias=False),
    NormConfig("rmsnorm", bias=False, scale="one_plus_weight"),
    NormConfig(bias=False, scale="none"),
]


@pytest.mark.parametrize("config", NORMS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm(config: NormConfig, dtype: jnp.dtype) -> None:
    x = (3 + 0.5 * normal(0, 2, 5, 53)).astype(dtype)
    weight = None if config.scale == "none" else normal(1, 53)
    bias = normal(2, 53) if config.bias else None
    out = Norm(weight, bias, config)(x)
    assert out.dtype == dtype
    parts = [None if part is None else f64(part) for part in (weight, bias)]
    expected = reference.norm(config, f64(x), *parts)
    check(out, expected, 2e-6 if dtype == jnp.float32 else BF16)


@pytest.mark.parametrize("config", NORMS, ids=str)
def test_fresh_norm_has_the_configs_fields(config: NormConfig) -> None:
    """And scales by 1."""
    norm = Norm.init(config, 53)
    assert norm.config == config
    assert (norm.bias is not None) == config.bias
    assert (norm.weight is None) == (config.scale == "none")
    x = normal(0, 2, 53)
    ones = np.zeros(53) if config.scale == "one_plus_weight" else np.ones(53)
    check(norm(x), reference.norm(config, f64(x), ones, None), 2e-6)


@pytest.mark.parametrize("config", NORMS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("shape", "platform"),
    [((2, 71, 53), "cpu"), ((3, 53), "cpu"), ((2, 71, 53), "default")],
    ids=["many rows", "few rows", "elsewhere"],
)
def test_gradients_of_norm(
    config: NormConfig,
    dtype: jnp.dtype,
    shape: tuple[int, ...],
    platform: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against their formulas, by each platform's path; what passes beside adds its own."""

    def choose(*args: jax.Array | None, **paths: Callable) -> jax.Array:
        return paths[platform](*args)

    monkeypatch.setattr(normalize_module, "by_platform", choose)
    x, dy, d_beside = ((1 + normal(key, *shape)).astype(dtype) for key in (0, 3, 4))
    weight = None if config.scale == "none" else normal(1, 53)
    bias = normal(2, 53) if config.bias else None
    norm = Norm(weight, bias, config)
    (beside, y), pull = jax.vjp(lambda norm, x: norm.beside(x), norm, x)
    assert np.array_equal(beside, x)
    assert np.array_equal(y, norm(x))
    d_norm, d_x = pull((d_beside, dy))
    assert d_x.dtype == dtype
    (alone,) = jax.vjp(lambda x: norm(x), x)[1](dy)

    rows, g = f64(x), f64(dy)
    if config.kind == "layernorm":
        rows = rows - rows.mean(-1, keepdims=True)
    per_deviation = 1 / np.sqrt(np.square(rows).mean(-1, keepdims=True) + config.eps)
    normed = rows * per_deviation
    scale = 1.0 if weight is None else f64(weight) + (config.scale == "one_plus_weight")
    d_y = g * scale
    expected = d_y - normed * (d_y * normed).mean(-1, keepdims=True)
    if config.kind == "layernorm":
        expected = expected - d_y.mean(-1, keepdims=True)
    expected = expected * per_deviation
    tolerance = 3e-6 if dtype == jnp.float32 else BF16
    check(alone, expected, tolerance)
    roundings = 1 if platform == "cpu" else 2  # elsewhere the norm's gradient is one by itself
    check(d_x, expected + f64(d_beside), roundings * tolerance)
    across = tuple(range(len(shape) - 1))
    if weight is not None:
        check(d_norm.weight, (g * normed).sum(across), 3e-6)
    if bias is not None:
        check(d_norm.bias, g.sum(across), 3e-6)


def test_gradient_of_norm_keeps_what_is_left_of_a_cancellation() -> None:
    """The weight's digits beyond bfloat16's are all that this gradient is made of."""
    x, weight = normal(0, 71, 53, dtype=jnp.bfloat16), 1 + 2.0**-10 * normal(1, 53)
    norm = Norm(weight, None, NormConfig(bias=False))
    (d_x,) = jax.vjp(lambda x: norm(x), x)[1](jnp.ones_like(x))
    rows, scale = f64(x), f64(weight)[None, :]
    rows = rows - rows.mean(-1, keepdims=True)
    per_deviation = 1 / np.sqrt(np.square(rows).mean(-1, keepdims=True) + norm.config.eps)
    normed = rows * per_deviation
    expected = scale - scale.mean() - normed * (scale * normed).mean(-1, keepdims=True)
    check(d_x, expected * per_deviation, BF16)


# Activations


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activation(name: str) -> None:
    x = np.concatenate([np.linspace(-8, 8, 257), [-80, 80]]).astype(np.float32)
    found = f64(activate(jnp.asarray(x), name))
    expected = reference.ACTIVATIONS[name](x.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activation_of_bfloat16_is_off_by_its_rounding(name: str) -> None:
    """Value and slope."""
    x = jnp.concatenate([jnp.linspace(-8, 8, 1001), jnp.array([-80.0, 80.0])]).astype(jnp.bfloat16)
    found, slope = jax.vmap(jax.value_and_grad(lambda x: activate(x, name)))(x)
    exact, formula, step = f64(x), reference.ACTIVATIONS[name], 1e-6
    np.testing.assert_allclose(f64(found), formula(exact), rtol=2**-8, atol=1e-6)
    expected = (formula(exact + step) - formula(exact - step)) / (2 * step)
    smooth = exact != 0  # relu has none there
    # Of its exponential, the slope is off by another 1e-4.
    np.testing.assert_allclose(f64(slope)[smooth], expected[smooth], rtol=1.03 * 2**-8, atol=1e-6)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activation_of_bfloat16_has_second_derivatives(name: str) -> None:
    x = jnp.linspace(-7.9, 8, 1001).astype(jnp.bfloat16)
    found = jax.vmap(jax.grad(jax.grad(lambda x: activate(x, name))))(x)
    exact, formula, step = f64(x), reference.ACTIVATIONS[name], 1e-3
    expected = (formula(exact + step) - 2 * formula(exact) + formula(exact - step)) / step**2
    np.testing.assert_allclose(f64(found), expected, atol=0.01)


def test_a_gate_of_bfloat16_has_slopes() -> None:
    gate, x = (normal(key, 1009, dtype=jnp.bfloat16) for key in (0, 1))
    y, pull = jax.vjp(lambda gate, x: activate_gated(gate, x, "silu"), gate, x)
    d_gate, d_x = pull(jnp.ones_like(y))
    gate, x = f64(gate), f64(x)
    sigmoid = 1 / (1 + np.exp(-gate))
    np.testing.assert_allclose(f64(d_x), gate * sigmoid, rtol=2**-8)
    expected = x * sigmoid * (1 + gate * (1 - sigmoid))
    np.testing.assert_allclose(f64(d_gate), expected, rtol=2**-8, atol=1e-4)
