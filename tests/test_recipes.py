"""What a recipe is made of, beside its update rule: runs with it, their average, their target."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import interrupted
from tiny_run import FLAGS, ROOT, losses, make_dataset

from eqx_gpt import GPT, get_config
from eqx_gpt.tree import named_arrays
from train.checkpoint import Checkpoints
from train.config import TrainConfig, architecture, model_config
from train.loop import train as run_training
from train.manifest import Manifest
from train.optimizer import make_optimizer
from train.run import RunError
from train.start import new_state, skeleton, started_model
from train.step import Recipe, TrainState, train_step
from weights import from_pretrained

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODERN = {
    "position": "rope", "norm": "rmsnorm", "activation": "relu2", "qk_norm": "head",
    "head": "untied", "logit_softcap": 15.0, "zero_init": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Manifest.read(make_dataset(tmp_path_factory.mktemp("data")) / "tiny")


def tiny(out_dir, **fields):
    shorter = {"max_iters": 11, "lr_decay_iters": 11, "eval_interval": 5, "block_size": 12}
    return TrainConfig(**{**FLAGS, **shorter, **fields}, out_dir=str(out_dir))


def state_of(config, data):
    """What the run's last checkpoint holds."""
    _, model = started_model(config, data, None)
    checkpoints = Checkpoints(Path(config.out_dir))
    state, _ = checkpoints.restore(skeleton(config, model, jnp.float32))
    checkpoints.close()
    return state


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "muon", "ema_decay": 0.9, "lr_schedule": "linear", "n_embd": 12, **MODERN},
        {"optimizer": "adafactor", "moment_dtype": "bfloat16", "lr_schedule": "wsd",
         "z_loss": 1e-3, "label_smoothing": 0.1, "remat": "dots"},
    ],
    ids=lambda fields: fields["optimizer"],
)  # fmt: skip
def test_an_interrupted_run_goes_on_exactly(fields, data, tmp_path, monkeypatch):
    run_training(tiny(tmp_path / "straight", **fields), data)
    config = tiny(tmp_path / "stopped", **fields)
    outcome = interrupted(monkeypatch, 8, config, data)
    assert 0 < outcome.steps_done < 11
    run_training(config, data, resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    states = [state_of(tiny(tmp_path / name, **fields), data) for name in ("straight", "stopped")]
    a, b = map(named_arrays, states)
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], err_msg=name)


def test_average_is_evaluated_saved_and_loaded(data, tmp_path):
    config = tiny(tmp_path / "run", ema_decay=0.7, dropout=0.0, learning_rate=0.1)
    run_training(config, data)
    state = state_of(config, data)
    loaded = named_arrays(from_pretrained(tmp_path / "run"))
    for name, x in named_arrays(state.average).items():
        np.testing.assert_array_equal(loaded[name], x, err_msg=name)
    assert not np.array_equal(loaded["wte.weight"], state.params.wte.weight)
    again = run_training(dataclasses.replace(config, eval_only=True), data, resume=True)
    assert again.val_loss == pytest.approx(losses(tmp_path / "run")["val_loss", 11], rel=1e-6)


def test_average_is_its_formula():
    config = TrainConfig(n_layer=1, n_head=1, n_embd=6, vocab_size=7, block_size=5, ema_decay=0.75)
    model = GPT.init(model_config(config, 7), key=jax.random.key(0))
    recipe = Recipe(make_optimizer(config), jnp.dtype("float32"), jax.random.key(1), ema_decay=0.75)
    state = TrainState.init(model, recipe.optimizer, averaged=True)
    windows = jax.random.randint(jax.random.key(2), (1, 3, 6), 0, 7)
    expected = None
    for _ in range(20):
        state, _ = train_step((recipe, windows), state)
        x = np.asarray(state.params.wte.weight, np.float64)
        expected = x if expected is None else 0.75 * expected + 0.25 * x
        np.testing.assert_allclose(state.average.wte.weight, expected, atol=1e-7)


def whole_loss(model, tokens, block_size):
    """Over every target of the split, each in its block, in float64."""
    total, run = 0.0, eqx.filter_jit(model)
    for begin in range(0, len(tokens) - 1, block_size):
        inputs = tokens[begin : begin + block_size + 1].astype(np.int32)
        logits = np.asarray(run(inputs[:-1]), np.float64)
        log_sum = np.log(np.exp(logits).sum(-1))
        total += float((log_sum - logits[np.arange(len(inputs) - 1), inputs[1:]]).sum())
    return total / (len(tokens) - 1)


def test_target_ends_the_run(data, tmp_path, capsys):
    config = tiny(
        tmp_path / "run", max_iters=400, lr_decay_iters=400, dropout=0.0, target_val_loss=2.5
    )
    outcome = run_training(config, data)
    assert outcome.steps_done < 400
    assert outcome.steps_done % 5 == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluations = [record for record in map(json.loads, lines) if "val_loss" in record]
    assert {record["val_split"] for record in evaluations} == {"whole"}
    *missed, reached = [record["val_loss"] for record in evaluations]
    assert min(missed) > 2.5 >= reached
    model = from_pretrained(tmp_path / "run")
    assert whole_loss(model, data.tokens("val"), 12) == pytest.approx(reached, abs=0.01)
    said = capsys.readouterr().err
    assert f"target_val_loss=2.5 reached: {reached:.4f} over the whole validation split" in said


def test_a_target_that_is_missed_is_said(data, tmp_path, capsys):
    config = tiny(tmp_path / "run", dropout=0.0, target_val_loss=0.1)
    outcome = run_training(config, data)
    said = capsys.readouterr().err
    assert f"target_val_loss=0.1 not reached: {outcome.val_loss:.4f} over the whole" in said
    assert f"after the last of max_iters={config.max_iters} steps" in said


def test_seconds_since_start_count_from_before_the_imports():
    script = (
        "import time; time.sleep(1); begin = time.monotonic()\n"
        "from train.target import seconds_since_start\n"
        "print(seconds_since_start() - (time.monotonic() - begin))"
    )
    begin = time.monotonic()
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, check=True)
    before_the_import = float(out.stdout)
    assert 0.98 < before_the_import < time.monotonic() - begin


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "gemma-2b"])
def test_architecture_says_a_model(name):
    """And back: of what these have that a flag can say."""
    said = architecture(get_config(name))
    config = dataclasses.replace(TrainConfig(), **said)
    made = model_config(config, said["vocab_size"])
    assert architecture(made) == said


def test_modern_flags_reach_the_model():
    config = dataclasses.replace(TrainConfig(), **MODERN, n_kv_head=4, n_inner=100, rope_theta=5.0)
    model = model_config(config, 65)
    assert (model.position.kind, model.position.rope_theta) == ("rope", 5.0)
    assert (model.norm.kind, model.norm.bias) == ("rmsnorm", False)
    assert (model.mlp.activation, model.n_inner) == ("relu2", 100)
    assert (model.attention.qk_norm, model.n_kv_head) == ("head", 4)
    assert (model.head, model.logit_softcap) == ("untied", 15.0)
    biased = model_config(dataclasses.replace(config, bias=True), 65)
    assert (biased.norm.bias, biased.mlp.bias) == (False, True)


def test_zero_init_begins_with_blocks_that_do_nothing():
    config = TrainConfig(n_layer=2, n_head=2, n_embd=8, block_size=5, zero_init=True)
    state = new_state(config, model_config(config, 11), jax.random.key(0), None)
    model = state.model
    tokens = jnp.arange(5)
    alone = model.unembed(model.norm(model.wte(tokens) + model.wpe(tokens)))
    np.testing.assert_allclose(model(tokens), alone, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("position", "rope"), ("activation", "relu2"), ("zero_init", True), ("n_kv_head", 3)],
)
def test_a_pretrained_model_keeps_its_architecture(field, value, data):
    model = GPT.init(dataclasses.replace(get_config("gpt2"), n_layer=1, n_embd=12, vocab_size=99),
                     key=jax.random.key(0))  # fmt: skip
    config = TrainConfig(init_from="gpt2", **{field: value})
    with pytest.raises(ValueError, match=f"{field}={value} contradicts 'gpt2'"):
        started_model(config, data, model)


def test_another_recipe_is_another_run(data, tmp_path):
    config = tiny(tmp_path / "run")
    run_training(config, data)
    other = dataclasses.replace(config, optimizer="muon", ema_decay=0.9, max_iters=20)
    with pytest.raises(RunError, match=r"optimizer was 'adamw', now 'muon'; ema_decay was 0.0, no"):
        run_training(other, data, resume=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"wsd_decay": 0.0}, r"wsd_decay must be in \(0, 1\], got 0.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"target_val_loss": 0.0}, "target_val_loss must be above 0, got 0.0"),
        ({"n_inner": 0}, "n_inner must be at least 1, got 0"),
        ({"z_loss": math.inf}, "z_loss must be 0 or above, got inf"),
    ],
)
def test_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**fields)


def test_smoothing_and_z_loss_are_trained_on_and_not_evaluated():
    config = TrainConfig(n_layer=1, n_head=1, n_embd=6, vocab_size=7, block_size=5)
    state = new_state(config, model_config(config, 7), jax.random.key(0), None)
    windows = jax.random.randint(jax.random.key(2), (1, 3, 6), 0, 7)

    def loss(**fields):
        recipe = Recipe(make_optimizer(config), jnp.dtype("float32"), jax.random.key(1), **fields)
        return float(train_step((recipe, windows), jax.tree.map(jnp.copy, state))[1].loss)

    logits = np.asarray(state.model(windows[0, :, :-1]), np.float64)
    log_sum = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, np.asarray(windows[0, :, 1:, None]), -1)[..., 0]
    plain = (log_sum - target).mean()
    assert loss() == pytest.approx(plain, rel=1e-6)
    assert loss(z_loss=0.5) == pytest.approx(plain + 0.5 * (log_sum**2).mean(), rel=1e-6)
    smooth = (log_sum - 0.7 * target - 0.3 * logits.mean(-1)).mean()
    assert loss(label_smoothing=0.3) == pytest.approx(smooth, rel=1e-6)
