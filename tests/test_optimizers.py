"""Every update rule against its formula in float64, 20 steps; schedules and scales by name."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_rules import (
    CONFIG,
    DECAYS,
    MATRICES,
    STEPS,
    assert_close,
    gradients,
    new_model,
    rate,
    trained,
)

from eqx_gpt.tree import named_arrays, with_arrays
from train.muon import newton_schulz, orthogonalized
from train.optimizer import make_optimizer
from train.schedules import learning_rate

pytestmark = pytest.mark.usefixtures("quick_compilation")

F64 = np.ndarray


class Adam:
    def __init__(self, config):
        self.config, self.m, self.v, self.t = config, 0.0, 0.0, 0

    def __call__(self, g: F64) -> F64:
        b1, b2 = self.config.beta1, self.config.beta2
        self.t += 1
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return m / (np.sqrt(v) + 1e-8)


class Lion:
    """Algorithm 2 of the paper."""

    def __init__(self, config):
        self.config, self.m = config, 0.0

    def __call__(self, g: F64) -> F64:
        b1, b2 = self.config.beta1, self.config.beta2
        update = np.sign(b1 * self.m + (1 - b1) * g)
        self.m = b2 * self.m + (1 - b2) * g
        return update


class Adafactor:
    """Algorithm 4 of the paper for one array, with update clipping at 1 (its section 6)."""

    def __init__(self, config):
        self.r, self.c, self.v, self.t = 0.0, 0.0, 0.0, 0

    def __call__(self, g: F64) -> F64:
        self.t += 1
        b, square = 1 - self.t**-0.8, g**2 + 1e-30
        if g.ndim == 2:
            self.r = b * self.r + (1 - b) * square.mean(1)
            self.c = b * self.c + (1 - b) * square.mean(0)
            v = np.outer(self.r, self.c) / self.r.mean()
        else:
            v = self.v = b * self.v + (1 - b) * square
        update = g / np.sqrt(v)
        return update / max(1.0, math.sqrt((update**2).mean()))


def polar(x: F64) -> F64:
    x = x / np.sqrt((x**2).sum())
    if x.shape[0] > x.shape[1]:
        return polar(x.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon:
    """Of one matrix; the momentum is a plain sum, as the author's: its size is no matter."""

    def __init__(self, config):
        self.beta, self.buffer = config.muon_beta, 0.0
        self.ratio = config.muon_learning_rate / config.learning_rate

    def __call__(self, g: F64) -> F64:
        self.buffer = self.beta * self.buffer + g
        update = g + self.beta * self.buffer
        n_out, n_in = g.shape
        return polar(update) * math.sqrt(max(1, n_out / n_in)) * self.ratio


def parts(name, x):
    """The arrays that a rule treats by themselves: of each layer, and q, k and v apart."""
    layers = list(x) if name.startswith("blocks.") else [x]
    if name != "blocks.attention.qkv.weight":
        return [(layer,) for layer in layers]
    return [(layer[:14], layer[14:21], layer[21:]) for layer in layers]


def reference(config, rule_of):
    model = new_model(config)
    arrays = {name: np.asarray(x, np.float64) for name, x in named_arrays(model).items()}
    rules = {}
    for step in range(STEPS):
        lr = rate(config, step)
        for name, g in gradients(step).items():
            new_layers = []
            rule, splits = rule_of(name)
            cut = parts if splits else lambda _, x: [(y,) for y in x]
            whole = name if name.startswith("blocks.") else None
            g, x = (g, arrays[name]) if whole else (g[None], arrays[name][None])
            pairs = zip(cut(name, g), cut(name, x), strict=True)
            for i, (of_g, of_x) in enumerate(pairs):
                new = []
                for j, (one_g, one_x) in enumerate(zip(of_g, of_x, strict=True)):
                    update = rules.setdefault((name, i, j), rule(config))(one_g)
                    decay = config.weight_decay if name in DECAYS else 0.0
                    new.append(one_x - lr * (update + decay * one_x))
                new_layers.append(np.concatenate(new))
            arrays[name] = np.stack(new_layers) if whole else new_layers[0]
    return arrays


@pytest.mark.parametrize(
    ("name", "rule_of"),
    [
        ("adamw", lambda name: (Adam, False)),
        ("lion", lambda name: (Lion, False)),
        ("adafactor", lambda name: (Adafactor, False)),
    ],
)
def test_rule_is_its_formula(name, rule_of):
    config = dataclasses.replace(CONFIG, optimizer=name)
    assert_close(trained(config), reference(config, rule_of), new_model(config), 2e-5)


def test_muon_is_its_formula(monkeypatch):
    """In float32 here, so that a wrong factor cannot hide in the rounding of bfloat16."""
    monkeypatch.setattr("train.optimizer.MUON_DTYPE", jnp.float32)
    config = dataclasses.replace(CONFIG, optimizer="muon", muon_beta=0.9)
    expected = reference(config, lambda name: (Muon, True) if name in MATRICES else (Adam, False))
    assert_close(trained(config), expected, new_model(config), 1e-3)


@pytest.mark.parametrize("shape", [(5, 7, 11), (3, 13, 13)])
def test_newton_schulz_is_optax_contribs(shape):
    from optax.contrib._muon import orthogonalize_via_newton_schulz

    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    coefficients = jnp.asarray([3.4445, -4.7750, 2.0315])
    for found, matrix in zip(newton_schulz(x), x, strict=True):
        with jax.numpy_rank_promotion("allow"):
            expected = orthogonalize_via_newton_schulz(matrix, coefficients)
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_newton_schulz_brings_singular_values_near_one():
    x = np.random.default_rng(0).standard_normal((4, 23, 37))
    for dtype in (jnp.float32, jnp.bfloat16):
        found = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(x, jnp.float32), dtype)))[1]
        assert found.min() > 0.6
        assert found.max() < 1.3
    assert float(jnp.abs(newton_schulz(jnp.zeros((1, 3, 5)))).max()) == 0.0


def test_bfloat16_muon_goes_the_same_way():
    config = CONFIG
    grads = with_arrays(new_model(config), {
        name: jnp.asarray(g, jnp.float32) for name, g in gradients(0).items()
    }).blocks.mlp  # fmt: skip
    a, b = (orthogonalized([grads.up.weight], dtype)[0] for dtype in (jnp.float32, jnp.bfloat16))
    assert float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.999


# Schedules


@pytest.mark.parametrize("name", ["linear", "wsd", "constant"])
def test_schedules(name):
    config = dataclasses.replace(
        CONFIG, lr_schedule=name, warmup_iters=5, lr_decay_iters=50, wsd_decay=0.3
    )
    begin = {"linear": 5, "wsd": 35, "constant": 50}[name]
    schedule = learning_rate(config)
    for it in range(60):
        if it < 5:
            expected = 3e-3 * (it + 1) / 6
        elif it < begin or name == "constant":
            expected = 3e-3
        else:
            expected = max(1e-4, 3e-3 + (1e-4 - 3e-3) * (it - begin) / (50 - begin))
        assert float(schedule(it)) == pytest.approx(expected, rel=1e-5), it


# By name


def moved(config):
    """How far one step takes each array, against the plain config's."""
    plain = trained(dataclasses.replace(config, lr_scale=""), 1)
    other = trained(config, 1)
    start = {name: np.asarray(x, np.float64) for name, x in named_arrays(new_model()).items()}
    found = {}
    for name in start:
        a, b = other[name] - start[name], plain[name] - start[name]
        found[name] = float((a * b).sum() / (b * b).sum())
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_lr_scale(optimizer):
    scales = "wte.weight=0.1, blocks.mlp.*=2,blocks.mlp.up.weight=0,*.bias=0.5"
    found = moved(dataclasses.replace(CONFIG, optimizer=optimizer, lr_scale=scales))
    for name, factor in found.items():
        expected = 1.0
        if name.endswith(".bias"):
            expected = 0.5
        elif name == "wte.weight":
            expected = 0.1
        elif name.startswith("blocks.mlp."):
            expected = 0.0 if name == "blocks.mlp.up.weight" else 2.0
        assert factor == pytest.approx(expected, rel=1e-3, abs=1e-9), name


def test_decay_scale():
    """With no gradient only decay moves: by learning rate times decay."""
    config = dataclasses.replace(CONFIG, decay_scale="blocks.*=3,wpe.weight=0,norm.weight=1")
    model = jax.tree.map(jnp.ones_like, new_model())
    optimizer = make_optimizer(config)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = optimizer.update(zeros, optimizer.init(model), model)
    for name, update in named_arrays(updates).items():
        factor = 3.0 if name.startswith("blocks.") else float(name in ("wte.weight", "norm.weight"))
        np.testing.assert_allclose(update, -3e-3 / 6 * 0.2 * factor, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr_scale": "wte.wait=2"}, r"lr_scale: no name fits 'wte\.wait'; there are wte\.weight"),
        ({"lr_scale": "wte.weight"}, "lr_scale: expected pattern=factor, .* got 'wte.weight'"),
        ({"decay_scale": "wte.weight=x"}, "decay_scale: expected pattern=factor"),
        ({"decay_scale": "wte.weight=-1"}, "a factor of 0 or above, got 'wte.weight=-1'"),
    ],
)
def test_wrong_scales_are_refused_before_a_step(fields, words):
    optimizer = make_optimizer(dataclasses.replace(CONFIG, **fields))
    with pytest.raises(ValueError, match=words):
        optimizer.init(new_model())


# State


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_bfloat16_state(name):
    """Half the bytes, and a way through 20 steps that stays near that of float32."""
    config = dataclasses.replace(CONFIG, optimizer=name)
    halved = dataclasses.replace(config, moment_dtype="bfloat16")
    state = make_optimizer(halved).init(new_model())
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.bfloat16)}
    start = {name: np.asarray(x, np.float64) for name, x in named_arrays(new_model()).items()}
    a, b = trained(config), trained(halved)
    for key, begun in start.items():
        way, other = a[key] - begun, b[key] - begun
        cosine = (way * other).sum() / np.sqrt((way**2).sum() * (other**2).sum())
        assert cosine > 0.99, key


def test_adafactor_keeps_rows_and_columns():
    config = dataclasses.replace(CONFIG, optimizer="adafactor")
    state = make_optimizer(config).init(new_model())
    kept = sum(x.size for x in jax.tree.leaves(state))
    sizes = sum(x.size for x in jax.tree.leaves(new_model()))
    assert kept < 0.35 * sizes  # at 14 wide; vectors are kept whole


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decay_lr": False, "lr_schedule": "wsd"}, "lr_schedule='wsd' says nothing with decay_lr"),
        ({"optimizer": "muon", "learning_rate": 0.0}, "learning_rate=0 gives muon no schedule"),
        ({"moment_dtype": "bfloat16", "beta2": 0.999}, "beta2=0.999 adds less .* 0.99 or less"),
        ({"optimizer": "muon", "moment_dtype": "bfloat16", "beta2": 0.999}, "beta2=0.999 adds"),
    ],
)
def test_contradictions_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **fields).check_together()


def test_a_new_run_keeps_moments_that_do_not_freeze():
    halved = dataclasses.replace(CONFIG, optimizer="adafactor", moment_dtype="bfloat16")
    dataclasses.replace(halved, max_iters=316).check_new()
    with pytest.raises(ValueError, match=r"max_iters=2000 adafactor's last step adds 0\.0023 .*32"):
        dataclasses.replace(halved, max_iters=2000).check_new()
