"""Programs for GPUs and TPUs, made on a machine that has neither.

What runs here: the TPU's kernel in Pallas' interpreter, and the lowering of whole steps. cuDNN's
kernel cannot be lowered without cuDNN, so of that only the choice and its conditions are tested.
"""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eqx_gpt import GPT, GPTConfig, for_inference
from eqx_gpt.cache import KVCache
from eqx_gpt.ops import fused
from train.config import TrainConfig
from train.devices import Execution, describe_arithmetic
from train.optimizer import make_optimizer
from train.step import Recipe, TrainState, train_step

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=67)
CUDNN = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"


@pytest.mark.parametrize(
    ("seq", "window", "softcap", "scale"),
    [(256, None, None, None), (150, 37, None, 0.3), (131, None, 0.5, None)],
)
def test_splash_attention_is_causal_attention(seq, window, softcap, scale):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((seq, head, 16)) for head in (6, 3, 3)]
    directions = [rng.standard_normal(x.shape) for x in inputs]
    g = rng.standard_normal(inputs[0].shape)
    options = {"window": window, "softcap": softcap, "scale": scale}

    @jax.jit
    def run(q, k, v, g):
        attend = lambda *x: fused.attention("tpu", *x, **options, interpret=True)  # noqa: E731
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(g)

    out, gradients = run(*(jnp.asarray(x, jnp.float32)[None] for x in (*inputs, g)))
    expected = reference.attention(*inputs, **options)
    np.testing.assert_allclose(out[0], expected, atol=1e-5 * np.abs(expected).max())
    for i, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):
        ahead, behind = (
            reference.attention(
                *(x + sign * 1e-5 * direction if j == i else x for j, x in enumerate(inputs)),
                **options,
            )
            for sign in (1, -1)
        )
        slope = np.sum(g * (ahead - behind)) / 2e-5
        found = np.sum(np.asarray(gradient[0], np.float64) * direction)
        size = np.linalg.norm(gradient[0]) * np.linalg.norm(direction)
        assert abs(found - slope) < 1e-5 * size


def test_splash_attention_tells_documents_apart():
    rng, lengths = np.random.default_rng(0), (37, 1, 93)
    q, k, v = (rng.standard_normal((sum(lengths), 3, 16)) for _ in range(3))
    starts = jnp.asarray(np.repeat([0, 37, 38], lengths), jnp.int32)[None]
    inputs = (jnp.asarray(x, jnp.float32)[None] for x in (q, k, v))
    found = fused.attention("tpu", *inputs, window=29, starts=starts, interpret=True)
    documents = zip(*(np.split(x, [37, 38]) for x in (q, k, v)), strict=True)
    expected = np.concatenate([reference.attention(*x, window=29) for x in documents])
    np.testing.assert_allclose(found[0], expected, atol=1e-5 * np.abs(expected).max())


def refusal(platform, **changes):
    usual = {"dtype": jnp.bfloat16, "head_dim": 64, "seq": 1024}
    return fused.refusal(platform, **{**usual, **changes})


def test_what_splash_attention_cannot_do():
    assert refusal("tpu") is None
    assert refusal("tpu", window=7, softcap=50.0, seq=1000, head_dim=80, dtype=jnp.float32) is None
    assert "no dropout" in refusal("tpu", dropout=0.1)
    assert "64 positions" in refusal("tpu", seq=64)
    assert refusal("tpu", packed=True) is None


def test_what_cudnn_cannot_do(monkeypatch):
    assert "dropout" in refusal("cuda", dropout=0.1)
    assert "soft cap" in refusal("cuda", softcap=50.0)
    assert "documents" in refusal("cuda", packed=True)
    assert "float32" in refusal("cuda", dtype=jnp.float32)
    if jax.default_backend() == "cpu":
        assert refusal("cuda") == "cuDNN is not detected."
        monkeypatch.setattr(CUDNN, lambda: 91_000)
    assert refusal("cuda") is None
    assert refusal("cuda", window=7, seq=1000, dtype=jnp.float16) is None
    assert "multiple of 8" in refusal("cuda", head_dim=60)
    assert "head dim" in refusal("cuda", head_dim=264)


def test_cudnn_is_given_even_lengths(monkeypatch):
    """Its gradients want them; what is added changes neither output nor gradients."""
    plain, seen = jax.nn.dot_product_attention, []

    def as_cudnn(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        seen.append((q.shape[1], k.shape[1], v.shape[1]))
        return plain(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    rng = np.random.default_rng(0)
    for seq in (13, 14):
        q, k, v = inputs = [rng.standard_normal((seq, head, 8)) for head in (6, 3, 3)]
        single = [jnp.asarray(x, jnp.float32)[None] for x in inputs]
        with jax.default_matmul_precision("highest"):
            out, pull = jax.vjp(lambda *x: fused.attention("cuda", *x, window=5), *single)
        expected = reference.attention(q, k, v, window=5)
        np.testing.assert_allclose(out[0], expected, atol=1e-6)
        # The last query's output depends on no key outside its window, and on every one inside.
        d_q, d_k, d_v = pull(jnp.zeros_like(out).at[:, -1].set(1.0))
        assert d_q.shape == single[0].shape
        for d in (d_k, d_v):
            reached = np.abs(np.asarray(d[0])).max(axis=(1, 2)) > 0
            assert list(reached) == [False] * (seq - 5) + [True] * 5
    assert seen == [(14, 14, 14), (14, 14, 14)]


def test_the_choice_of_a_platform():
    here = {"gpu": "cuda", "tpu": "tpu", "cpu": None}[jax.default_backend()]
    assert fused.platform() == here
    with fused.lowering_for("tpu"):
        assert fused.platform() == "tpu"
    assert fused.platform() == here


def test_the_header_names_the_attention_or_says_why_not():
    execution = Execution(jnp.dtype(jnp.bfloat16), 1, 1, "device", 1)
    here = {"gpu": "attention", "tpu": "attention", "cpu": "bfloat16 products"}
    assert here[jax.default_backend()] in describe_arithmetic(execution, CONFIG, 128)
    dropout = replace(CONFIG, dropout=0.2)
    elsewhere = replace(dropout, attention_dropout=0.0)
    with fused.lowering_for("tpu"):
        fast = describe_arithmetic(execution, CONFIG, 128)
        slow = describe_arithmetic(execution, dropout, 128)
        assert describe_arithmetic(execution, elsewhere, 128) == fast
    assert fast == "bfloat16 products, attention by splash attention"
    assert slow.endswith("plain attention because of splash attention: it has no dropout")


def lowered(step: Callable, arguments: object, platform: str) -> str:
    """The StableHLO of `step(*arguments)` for `platform`, made in this process."""
    arrays, static = eqx.partition(arguments, eqx.is_array)

    def run(arrays):
        return eqx.filter(step(*eqx.combine(arrays, static)), eqx.is_array)

    jax.clear_caches()
    with fused.lowering_for(platform):
        return jax.export.export(jax.jit(run), platforms=[platform])(arrays).mlir_module()


def lowered_train_step(platform: str, dtype: object = jnp.bfloat16) -> str:
    optimizer = make_optimizer(TrainConfig())
    model = GPT.init(CONFIG, key=jax.random.key(0))
    recipe = Recipe(optimizer, jnp.dtype(dtype), jax.random.key(1))
    windows = jnp.zeros((1, 3, CONFIG.block_size + 1), jnp.int32)

    def step(windows, state):
        return train_step((recipe, windows), state)

    return lowered(step, (windows, TrainState.init(model, optimizer)), platform)


def lowered_decode_step(platform: str) -> str:
    model = for_inference(GPT.init(CONFIG, key=jax.random.key(0)))

    def step(token, model, cache):
        hidden, cache = model.hidden(token, cache=cache)
        return jnp.argmax(model.unembed(hidden), axis=-1), cache

    cache = KVCache.init(CONFIG, (), CONFIG.block_size)
    return lowered(step, (jnp.zeros((1,), jnp.int32), model, cache), platform)


# Where the CPU's arrangements are written: the programs say of every operation where it is from.
CPU_ONLY = (
    '"_canonical_product', '"laid_out', '"_rounded_by_integers', '"_rounded_and_stored',
    "/blocked_attention.py", "/few_rows.py",
)  # fmt: skip


def test_the_cpu_has_its_arrangements():
    both = lowered_train_step("cpu") + lowered_decode_step("cpu")
    assert [name for name in CPU_ONLY if name not in both] == []


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_steps_for_accelerators_are_plain(platform):
    train, decode = lowered_train_step(platform), lowered_decode_step(platform)
    for program in (train, decode):
        assert "stablehlo.dot_general" in program
        assert [name for name in CPU_ONLY if name in program] == []
    kernels = train.count("@tpu_custom_call")
    assert kernels >= 3 if platform == "tpu" else kernels == 0  # forward, and two backward
