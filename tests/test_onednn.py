"""oneDNN's linear maps: what they give, who gets them, and that their programs are never stored."""

import os
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import FLAGS, command, losses, make_dataset, run

from eqx_gpt import GPT, GPTConfig
from eqx_gpt.ops import onednn
from eqx_gpt.ops.cross_entropy import cross_entropy
from eqx_gpt.ops.matmul import linear
from train.config import TrainConfig
from train.devices import Execution, describe_arithmetic
from train.optimizer import make_optimizer
from train.step import (
    Gradients,
    Recipe,
    StepMetrics,
    TrainState,
    add_gradients,
    apply_gradients,
    compile_step,
    train_step,
)

WHY_NOT = onednn.refusal()
here = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="this is no CPU")


def numbers(seed: int, *shape: int) -> np.ndarray:
    """That bfloat16 has exactly."""
    x = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def test_this_jaxlib_was_tried():
    """A newer one: add it to TRIED, and see whether this file's tests pass and a step gains."""
    assert ".".join(version("jaxlib").split(".")[:2]) in onednn.TRIED


# Either way to the weight's gradient, more rows than a map has inputs and fewer.
@here
@pytest.mark.parametrize("shape", [(2, 257, 131, 251), (1, 257, 1031, 127), (3, 5, 2053, 557)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("biased", [True, False])
def test_maps_and_gradients_against_float64(shape, dtype, biased):
    batch, seq, n_in, n_out = shape
    x, weight, bias, g = (
        numbers(0, batch, seq, n_in), numbers(1, n_out, n_in), numbers(2, n_out),
        numbers(3, batch, seq, n_out),
    )  # fmt: skip
    low = jnp.asarray(x, jnp.bfloat16)
    params = [jnp.asarray(p, jnp.float32) for p in ((weight, bias) if biased else (weight,))]

    def both(low, *params):
        with onednn.products_by("onednn"):
            y, pull = jax.vjp(lambda x, *params: linear(x, *params, dtype=dtype), low, *params)
            return y, pull(jnp.asarray(g, dtype))

    with onednn.stored_if_by("onednn"):
        compiled = jax.jit(both).lower(low, *params).compile()
    assert compiled.as_text().count("__onednn$matmul") == 3
    y, (d_x, d_weight, *d_bias) = compiled(low, *params)
    assert (y.dtype, d_x.dtype, d_weight.dtype) == (dtype, jnp.bfloat16, jnp.float32)

    def close(found, wanted, n_sum):
        """Sums in float32; where it is bfloat16, rounded once, to 8 bits."""
        size = np.sqrt(n_sum) * 2.0**-22  # of sums of numbers about one
        step = 2.0**-8 if found.dtype == jnp.bfloat16 else 2.0**-24
        np.testing.assert_allclose(
            np.asarray(found, np.float64), wanted, rtol=1.01 * step, atol=8 * size
        )

    close(y, x @ weight.T + (bias if biased else 0), n_in)
    close(d_x, g @ weight, n_out)
    rows, d_rows = x.reshape(-1, n_in), g.reshape(-1, n_out)
    close(d_weight, d_rows.T @ rows, len(rows))
    assert len(d_bias) == biased
    for d in d_bias:
        close(d, d_rows.sum(0), len(rows))


@here
def test_the_loss_by_tiles_against_float64():
    rows, d_model, vocab = 257, 131, 8209
    x, weight = numbers(0, rows, d_model), numbers(1, vocab, d_model) / 16
    labels = np.random.default_rng(2).integers(0, vocab, rows)

    def loss(x, weight):
        with onednn.products_by("onednn"):
            return cross_entropy(x, weight, jnp.asarray(labels))

    arguments = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.float32)
    with onednn.stored_if_by("onednn"):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    assert compiled.as_text().count("__onednn$matmul") == 3
    found, (d_x, d_weight) = compiled(*arguments)

    logits = x @ weight.T
    lse = np.log(np.exp(logits).sum(-1))
    d = np.exp(logits - lse[:, None])
    np.testing.assert_allclose(found, (lse - logits[np.arange(rows), labels]).mean(), rtol=1e-5)
    d[np.arange(rows), labels] -= 1
    for ours, wanted in ((d_x, d @ weight / rows), (d_weight, d.T @ x / rows)):
        error = np.asarray(ours, np.float64) - wanted
        assert np.linalg.norm(error) < 0.004 * np.linalg.norm(wanted)  # bfloat16's rounding


@on_cpu
def test_who_gets_them(monkeypatch):
    monkeypatch.setattr(onednn, "refusal", lambda: None)
    x, weight = jnp.zeros((257, 263), jnp.bfloat16), jnp.zeros((251, 263))
    assert not onednn.takes(x, weight, 251)  # nobody asked
    with onednn.products_by("onednn"), onednn.stored_if_by("onednn"):
        assert onednn.takes(x, weight, 251)
        assert not onednn.takes(x.astype(jnp.float32), weight, 251)
        assert not onednn.takes(x, weight.astype(jnp.int8), 251)
        assert not onednn.takes(x[:4], weight, 251)

    def chosen(n_embd: int, n_parts: int = 1, **flags: object) -> str:
        config = TrainConfig(n_embd=n_embd, batch_size=4, **{"precision": "bfloat16", **flags})
        model = GPTConfig(n_layer=2, n_head=4, n_embd=n_embd)
        return Execution.choose(config, model, 10**6, "cpu", n_parts=n_parts).products

    assert [chosen(512), chosen(516), chosen(512, products="onednn")] == ["xla", "onednn", "onednn"]
    assert chosen(516, products="xla") == "xla"
    assert chosen(516, products="onednn", eval_only=True) == "xla"  # nothing is trained
    assert [chosen(516, precision="float32"), chosen(516, n_parts=2)] == ["xla", "xla"]
    for flags, why in (
        ({"precision": "float32"}, "they are for bfloat16, and precision is float32"),
        ({"n_parts": 2}, "they are for one device, a CPU, and nothing splits them"),
    ):
        with pytest.raises(ValueError, match=f"no products=onednn here: {why}; give products=xla"):
            chosen(516, products="onednn", **flags)

    execution = Execution(jnp.dtype(jnp.bfloat16), 1, 1, "device", 1, "onednn")
    assert describe_arithmetic(execution, GPTConfig(), 128).startswith(
        "bfloat16 products by oneDNN, "
    )


@on_cpu
def test_refusals(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx512_bf16 amx_bf16x\n")
    monkeypatch.setattr(onednn.platform, "system", lambda: "Linux")
    monkeypatch.setattr(onednn.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(onednn, "version", lambda _: "0.12.3")
    assert onednn.refusal(cpuinfo) == "they are for CPUs with AMX, which this one has not"
    assert onednn.refusal(tmp_path / "none") == onednn.refusal(cpuinfo)
    cpuinfo.write_text("flags : fpu amx_bf16 amx_tile\n")
    assert onednn.refusal(cpuinfo) is None
    monkeypatch.setattr(onednn.platform, "machine", lambda: "aarch64")
    assert onednn.refusal(cpuinfo) == "they are for x86-64 Linux, and this is aarch64 Linux"
    monkeypatch.setattr(onednn, "version", lambda _: "0.13.0")
    assert "tried with jaxlib 0.10, 0.11, 0.12, and this is 0.13.0" in str(onednn.refusal(cpuinfo))


def test_other_platforms_get_plain_products():
    x, weight = jnp.zeros((257, 263), jnp.bfloat16), jnp.zeros((251, 263))

    def loss(x, weight):
        with onednn.products_by("onednn"):
            return jnp.sum(linear(x, weight, dtype=jnp.float32))

    with onednn.stored_if_by("onednn"):
        step = jax.jit(jax.grad(loss, (0, 1)))
        text = jax.export.export(step, platforms=["cuda"])(x, weight).mlir_module()
    assert text.count(" = stablehlo.dot_general ") == 2
    assert "custom_call" not in text


def step_of(n_layer: int, remat: str = "none") -> tuple[Recipe, jax.Array, TrainState]:
    config = GPTConfig(
        n_layer=n_layer, n_head=4, n_embd=128, block_size=257, vocab_size=61, unroll=n_layer,
        remat=remat,
    )  # fmt: skip
    optimizer = make_optimizer(TrainConfig())
    recipe = Recipe(optimizer, jnp.dtype(jnp.bfloat16), jax.random.key(1), products="onednn")
    windows = jax.random.randint(jax.random.key(2), (1, 5, 257), 0, 61)
    return recipe, windows, TrainState.init(GPT.init(config, key=jax.random.key(0)), optimizer)


@here
def test_every_linear_map_of_a_step_is_one():
    recipe, windows, state = step_of(2)
    with onednn.stored_if_by("onednn"):
        text = train_step.lower((recipe, windows), state).compile().as_text()
    # Four maps a layer, of each the result and two gradients.
    assert len(re.findall(r" custom-call\(.*__onednn\$matmul", text)) == 2 * 4 * 3


@here
def test_a_program_with_them_is_never_stored(tmp_path, monkeypatch):
    """To try is to read the memory of something else: XLA says `std::bad_alloc` if it lives."""
    stored = Path(str(jax.config.jax_compilation_cache_dir))
    assert stored.is_dir()

    def entries() -> list[str]:
        return [p.name for p in stored.iterdir() if "train_step" in p.name]

    before = entries()
    recipe, windows, state = step_of(1)
    with pytest.raises(RuntimeError, match=f"cannot be kept in {stored}: compile it within"):
        train_step((recipe, windows), state)
    compile_step(recipe, windows, state, "device")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    state, metrics = train_step((recipe, windows), state)
    assert np.isfinite(metrics.loss)
    assert entries() == before

    other = replace(recipe, products="xla")
    text = train_step.lower((other, windows), step_of(1)[2]).as_text()
    assert "__onednn" not in text  # what was traced for one is not taken for the other
    _, by_xla = train_step((other, windows), step_of(1)[2])
    assert len(entries()) > len(before)
    np.testing.assert_allclose(metrics.loss, by_xla.loss, rtol=1e-4)
    np.testing.assert_allclose(metrics.grad_norm, by_xla.grad_norm, rtol=1e-3)


@here
@pytest.mark.parametrize(
    ("remat", "accumulate"), [("none", "host"), ("block", "device"), ("dots", "host")]
)
def test_a_step_is_that_by_xla(remat, accumulate):
    def metrics(products: str) -> StepMetrics:
        recipe, windows, state = step_of(1, remat)
        recipe = replace(recipe, products=products)
        windows = windows.reshape(1, 5, 257).repeat(2, axis=0)
        compile_step(recipe, windows, state, accumulate)
        if accumulate == "device":
            return train_step((recipe, windows), state)[1]
        gradients = Gradients.zero(state.params)
        for micro in windows:
            gradients = add_gradients((recipe, micro, state), gradients)
        return apply_gradients(recipe, gradients, state)[1]

    ours, wanted = metrics("onednn"), metrics("xla")
    np.testing.assert_allclose(ours.loss, wanted.loss, rtol=1e-4)
    np.testing.assert_allclose(ours.grad_norm, wanted.grad_norm, rtol=1e-3)


@here
def test_a_run_with_them_goes_on_exactly_and_stores_no_step(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    data = make_dataset(tmp_path / "data")
    flags = {
        **FLAGS, "data_dir": data, "precision": "bfloat16", "products": "onednn", "n_embd": 64,
        "block_size": 127, "batch_size": 17, "max_iters": 6, "lr_decay_iters": 6,
        "eval_interval": 6, "checkpoint_interval": 3,
    }  # fmt: skip
    whole = run(command("train.py", out_dir=tmp_path / "whole", **flags), tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "bfloat16 products by oneDNN, attention in blocks" in whole.stdout + whole.stderr
    parts = {"out_dir": tmp_path / "parts"}
    for more in ({**flags, "max_iters": 3}, {"init_from": "resume", "max_iters": 6}):
        part = run(command("train.py", **parts, **more), tmp_path)
        assert part.returncode == 0, part.stderr
    wanted = losses(tmp_path / "whole")
    found = losses(tmp_path / "parts")
    assert {key: found[key] for key in wanted} == wanted
    names = os.listdir(tmp_path / "programs")
    assert any("eval_step" in name for name in names)
    assert not any("train_step" in name for name in names)
