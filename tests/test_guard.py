"""Steps that are skipped: what stays as it was, what goes on, what ends a run."""

import dataclasses
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import FLAGS, TEXT, command, losses, make_dataset, run

import train.step
from eqx_gpt import GPT
from train.batches import placed
from train.config import TrainConfig, model_config
from train.data import Windows
from train.guard import HISTORY, BadSteps, Guard
from train.loop import train as run_training
from train.manifest import Manifest
from train.optimizer import clip_by_norm, make_optimizer
from train.step import (
    Gradients,
    Recipe,
    TrainState,
    add_gradients,
    apply_added,
    apply_gradients,
    train_step,
)

CONFIG = TrainConfig(n_layer=1, n_head=2, n_embd=14, block_size=11, vocab_size=37)
BATCH = jax.random.randint(jax.random.key(2), (2, 3, 12), 0, 37)


@pytest.fixture(autouse=True)
def _quick(quick_compilation):
    pass


def setup(skip_spikes=0.0):
    model = GPT.init(model_config(CONFIG, 37), key=jax.random.key(0))
    optimizer = make_optimizer(CONFIG)
    recipe = Recipe(optimizer, jnp.dtype(jnp.float32), jax.random.key(1), skip_spikes=skip_spikes)
    return recipe, TrainState.init(model, optimizer)


def on_device(recipe, state):
    return train_step((recipe, BATCH), state)


def from_host(recipe, state):
    gradients = Gradients.zero(state.params)
    for micro in BATCH:
        gradients = add_gradients((recipe, micro, state), gradients)
    return apply_gradients(recipe, gradients, state)


def arrays(*trees):
    """In numpy: a step donates its state."""
    return [np.array(x) for x in jax.tree.leaves(trees)]


@pytest.mark.parametrize("step", [on_device, from_host])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_leaves_no_trace(step, bad):
    recipe, state = setup()
    state, metrics = step(recipe, state)  # moments that are not zero
    assert (int(metrics.skipped), int(metrics.in_row)) == (0, 0)
    scale = state.params.norm.weight
    state = eqx.tree_at(lambda s: s.params.norm.weight, state, scale.at[3].set(bad))
    before, done = arrays(state.params, state.opt_state), int(state.step)
    for i in (1, 2):
        state, metrics = step(recipe, state)
        assert not np.isfinite(float(metrics.grad_norm))
        assert (int(metrics.skipped), int(metrics.in_row), int(state.step)) == (i, i, done + i)
    for x, y in zip(arrays(state.params, state.opt_state), before, strict=True):
        np.testing.assert_array_equal(x, y)
    state = eqx.tree_at(lambda s: s.params.norm.weight, state, jnp.ones(14))
    state, metrics = step(recipe, state)
    assert (int(metrics.skipped), int(metrics.in_row)) == (2, 0)
    assert not np.array_equal(np.array(state.params.wte.weight), before[0])


def test_a_spike_is_far_above_the_median_of_the_steps_taken():
    guard, seen = Guard.init(), []
    draw = np.random.default_rng(0)
    loss, takes = jnp.float32(1.0), eqx.filter_jit(lambda g, x: g.takes(loss, x, 5.0))
    after = eqx.filter_jit(Guard.after)
    for i in range(200):
        norm = np.float32(draw.lognormal()) if i % 19 else np.float32(1000.0)
        expected = len(seen) < HISTORY // 2 or norm <= 5 * np.median(seen[-HISTORY:])
        taken = takes(guard, jnp.asarray(norm))
        assert bool(taken) == expected, i
        guard = after(guard, taken, jnp.asarray(norm))
        if expected:
            seen.append(norm)
    assert int(guard.skipped) == 200 - len(seen) > 3
    for kept in (guard, Guard.init()):
        again = Guard.from_dict(json.loads(json.dumps(kept.to_dict())))
        for x, y in zip(arrays(kept), arrays(again), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_spike_is_skipped_only_if_asked_for():
    for skip_spikes, skipped in ((0.0, 0), (1.5, 1)):
        recipe, state = setup(skip_spikes)
        usual = jnp.full(HISTORY, 1e-3, jnp.float32)
        state = eqx.tree_at(lambda s: s.guard.norms, state, usual)
        _, metrics = on_device(recipe, state)
        assert int(metrics.skipped) == skipped


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_is_optaxs(limit):
    tree = {"a": jnp.arange(7.0), "b": -jnp.ones((3, 2))}
    norm = optax.tree.norm(tree)
    theirs = optax.clip_by_global_norm(limit).update(tree, optax.EmptyState())[0]
    for extra in ({}, {"norm": norm}):
        ours = clip_by_norm(limit).update(tree, optax.EmptyState(), **extra)[0]
        assert eqx.tree_equal(ours, theirs)


def test_the_guard_adds_no_pass_over_the_parameters(monkeypatch):
    """In the compiled step of a CPU, whose backend updates in place only what nobody else needs."""
    # What a command of an earlier test has put there came too late for this process.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    jax.config.update("jax_disable_most_optimizations", False)
    config = dataclasses.replace(CONFIG, n_embd=128, vocab_size=4096)
    model = GPT.init(model_config(config, 37), key=jax.random.key(0))
    optimizer = make_optimizer(config)
    recipe = Recipe(optimizer, jnp.dtype(jnp.float32), jax.random.key(1), skip_spikes=10.0)
    state = TrainState.init(model, optimizer)

    def plain(inputs, state):  # the step without a guard
        recipe, gradients = inputs
        grads = jax.tree.map(lambda g: g / gradients.count.astype(jnp.float32), gradients.params)
        updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
        params = eqx.apply_updates(state.params, updates)
        return params, opt_state, optax.tree.norm(grads)

    used: list[Any] = []
    step: Any
    for step in (apply_added, jax.jit(plain, donate_argnums=1)):
        gradients = Gradients.zero(state.params)
        compiled = step.lower((recipe, gradients), state).compile()
        used.append(
            (
                compiled.cost_analysis()["bytes accessed"],
                compiled.memory_analysis().temp_size_in_bytes,
            )
        )
    n_bytes = 4 * sum(x.size for x in jax.tree.leaves(state.params))
    for ours, without in zip(*used, strict=True):
        assert ours < without + 0.1 * n_bytes
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    make_dataset(place / "data")
    return place


def test_a_run_ends_after_too_many_and_says_what_they_read(place, monkeypatch):
    """The gradients of steps 12 to 16 are NaN, as of a broken accelerator."""
    config = TrainConfig(
        **{
            **FLAGS,
            "out_dir": str(place / "bad"),
            "data_dir": str(place / "data"),
            "max_skipped": 3,
        }
    )
    data = Manifest.read(place / "data" / "tiny")
    whole = train.step.next_token_loss

    def broken(model, windows, **kwargs):
        loss = whole(model, windows, **kwargs)
        if kwargs.get("key") is None:  # an evaluation
            return loss
        tokens = windows if not hasattr(windows, "tokens") else windows.tokens
        bad = jnp.any(jnp.stack([jnp.all(tokens == batch) for batch in batches]))
        return jnp.where(bad, jnp.nan, loss)

    windows = Windows(data.tokens("train"), config.block_size, config.seed)
    batches = [jnp.asarray(windows.batch(step, 3)) for step in range(12, 17)]
    monkeypatch.setattr(train.step, "next_token_loss", broken)
    jax.clear_caches()
    with pytest.raises(BadSteps) as caught:
        run_training(config, data)
    said = str(caught.value)
    assert "3 steps in a row were skipped, the last of them step 14" in said
    places = placed(windows, 14, 3)
    for row, (epoch, window) in enumerate(places[:2]):
        text = data.tokenizer().decode(windows.batch(14, 3)[row].tolist())
        assert f"row {row}, epoch {epoch}, window {window}: {text!r}" in said
        assert text in TEXT
    assert f"python scripts/batch.py --out_dir {config.out_dir} --step 14" in said
    assert max(int(p.name) for p in (place / "bad/checkpoints").iterdir()) == 10
    # Past it, with more patience: those five stay skipped, and are counted.
    config = dataclasses.replace(config, max_skipped=6)
    assert run_training(config, data, resume=True).steps_done == 30
    records = [json.loads(x) for x in (place / "bad/metrics.jsonl").read_text().splitlines()]
    skipped = {r["iter"]: r["skipped"] for r in records if "train_loss" in r}
    assert [skipped[i] for i in (11, 12, 16, 17, 29)] == [0, 1, 5, 5, 5]
    assert losses(place / "bad")["train_loss", 13] is None  # JSON has no NaN
    rates = {r["iter"]: r["lr"] for r in records if "train_loss" in r}
    assert rates[29] > rates[28] * 0.5
    monkeypatch.undo()
    jax.clear_caches()

    shown = run(command("batch.py", out_dir=config.out_dir, step=14), place)
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout.splitlines()) == 3
    assert f"row 2, epoch {places[2][0]}, window {places[2][1]}: " in shown.stdout
