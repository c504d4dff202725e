"""The compiled train step of a CPU: an upgrade that loses the fast products shows here."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import ROOT

from eqx_gpt import GPT, GPTConfig, cast, get_config
from eqx_gpt.cache import KVCache
from eqx_gpt.config import AttentionConfig
from eqx_gpt.ops.blocked_attention import attend_backward
from train import muon
from train.config import TrainConfig
from train.devices import cpu_multiplies_bfloat16
from train.optimizer import make_optimizer
from train.step import Recipe, TrainState, train_step

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 96, "vocab_size": 194}
MODELS = {
    "gpt2": GPTConfig(**SMALL),
    "llama": replace(get_config("smollm2-135m"), **SMALL, attention=AttentionConfig(n_kv_head=2)),
}
SEQ, BATCH = 96, 4

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not cpu_multiplies_bfloat16(),
    reason="this CPU does not multiply bfloat16",
)


def compiled_step(config: GPTConfig) -> str:
    optimizer = make_optimizer(TrainConfig())

    def step(state: TrainState, windows: jax.Array) -> TrainState:
        recipe = Recipe(optimizer, jnp.dtype(jnp.bfloat16), jax.random.key(1))
        return train_step((recipe, windows), state)[0]

    model = GPT.init(replace(config, unroll=config.n_layer), key=jax.random.key(0))
    state = TrainState.init(model, optimizer)
    windows = jnp.zeros((1, BATCH, SEQ + 1), jnp.int32)
    return jax.jit(step).lower(state, windows).compile().as_text()


def products(text: str) -> list[tuple[str, list[str]]]:
    """Of every matrix product: the computation it is in, and its operands' types. Not of those
    that only sum, with two rows or columns or one column a head."""
    found = []
    for computation in text.split("\n}\n"):
        types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", computation))
        header = computation.strip().split("{")[0]
        for shape, operands in re.findall(r"\[([\d,]+)\]\S* dot\(([^)]*)\)", computation):
            if min(int(size) for size in shape.split(",")[-2:]) <= SMALL["n_head"]:
                continue
            names = [name.strip() for name in operands.split(",")]
            found.append((header, [types[name.split(" ")[-1]] for name in names]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_product_of_a_step_is_a_fast_one(name):
    check_products(MODELS[name], compiled_step(MODELS[name]))


def test_the_flags_of_training_keep_products_fast():
    """And loops have several results by them. Flags are read once a process."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from scripts.xla_loops import fuse_results, use_whole_vectors
use_whole_vectors()
fuse_results()
from test_compiled import MODELS, compiled_step
for name in ("gpt2", "llama"):
    print(compiled_step(MODELS[name]), "END")
"""
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gpt2, llama, _ = done.stdout.split(" END\n")
    check_products(MODELS["gpt2"], gpt2)
    several = re.compile(r"= \(f32\[[\d,]+\]\S* f32\[[^)]*\) fusion\(")
    assert several.search(gpt2)
    assert not several.search(compiled_step(MODELS["gpt2"]))

    # A parameter and its two moments are made in one loop, from arrays that are read once.
    array = re.escape(f"f32[2,{MODELS['gpt2'].n_inner},64]") + r"\{2,1,0\}"
    update = re.compile(rf"= \({array}, {array}, {array}\) fusion\(")
    assert len(update.findall(gpt2)) == 1
    assert "branch_1" in gpt2  # of whether the step is taken
    assert not re.search(rf"= {array} fusion\([^\n]*branch_1", gpt2)

    # So are the two gradients of a gated activation, and no float32 of their size.
    n_inner, rows = MODELS["llama"].n_inner, BATCH * SEQ
    array = re.escape(f"bf16[{rows},{n_inner}]") + r"\{1,0\}"
    assert len(re.findall(rf"= \({array}, {array}\) fusion\(", llama)) == SMALL["n_layer"]
    assert not re.search(rf"= f32\[{BATCH},{SEQ},{n_inner}\]\S* fusion\(", llama)


def compiled_extension(config: GPTConfig, n_token: int) -> str:
    """Of a prefill, or of one token of decoding."""
    model = cast(GPT.init(config, key=jax.random.key(0)), jnp.bfloat16)
    cache = KVCache.init(config, (), SEQ, jnp.float32)
    extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache))
    return extend.lower(model, jnp.zeros(n_token, jnp.int32), cache).compile().as_text()


@pytest.mark.parametrize("work", ["prefill", "decoding"])
def test_angles_are_computed_once_for_all_layers_and_heads(work):
    """In one loop for the cosines and in one for the sines, which each need both."""
    config = replace(MODELS["llama"], n_layer=3)
    text = compiled_extension(config, {"prefill": SEQ, "decoding": 1}[work])
    assert (text.count(" cosine("), text.count(" sine(")) == (2, 2)


def check_grows_evenly(size: Callable[[int], int]) -> None:
    two, four, six = size(2), size(4), size(6)
    assert six - four == four - two


@pytest.mark.parametrize("work", ["step", "prefill", "decoding"])
@pytest.mark.parametrize("name", MODELS)
def test_no_layer_does_the_work_of_those_before_it_again(name, work):
    """What goes on from layer to layer is written down. If loops that read it made it anew, the
    program would grow with the square of the layers, and so would its time."""

    def size(n_layer: int) -> int:
        config = replace(MODELS[name], n_layer=n_layer)
        if work == "step":
            return compiled_step(config).count(" = ")
        return compiled_extension(config, {"prefill": SEQ, "decoding": 1}[work]).count(" = ")

    check_grows_evenly(size)


def test_no_iteration_of_muon_does_the_work_of_those_before_it_again(monkeypatch):
    def size(iterations: int) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(muon, "_ITERATIONS", iterations)
            step = jax.jit(lambda x: muon.newton_schulz(x, jnp.bfloat16))
            return step.lower(jnp.zeros((2, 96, 160))).compile().as_text().count(" = ")

    check_grows_evenly(size)


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_rounded_however_layers_are_compiled(name):
    """XLA takes a conversion to bfloat16 and back for none, if it may."""
    config = replace(MODELS[name], n_layer=4)
    model = cast(GPT.init(config, key=jax.random.key(0)), jnp.bfloat16)
    tokens = jax.random.randint(jax.random.key(1), (2, SEQ), 0, config.vocab_size)
    logits = jax.jit(lambda model, tokens: model(tokens))
    np.testing.assert_array_equal(logits(model.unstacked(), tokens), logits(model, tokens))


def test_gradients_of_queries_are_summed_without_updates_in_place():
    """Those, one in another, XLA makes on scalars."""
    x = jnp.zeros((1, 600, 2, 64), jnp.bfloat16)
    backward = partial(
        attend_backward, starts=None, seeds=None, window=None, scale=1.0, softcap=None, rate=0.0
    )
    numbers = jnp.zeros((1, 600, 2))
    text = jax.jit(backward).lower(x, x, x, out=x, lse=numbers, d=x).compile().as_text()
    assert " dot(" in text
    assert not re.search(r"= f32\S+ dynamic-update-slice\(", text)


def check_products(config: GPTConfig, text: str) -> None:
    found = products(text)
    # A layer has 4 maps (5 with a gate) of 3 products and attention of 7; the head has 3.
    maps = 5 if config.mlp.kind == "gated" else 4
    assert len(found) >= config.n_layer * (3 * maps + 7) + 3
    slow = [(header, types) for header, types in found if types != ["bf16", "bf16"]]
    assert not slow
    assert all("fused_computation" in header for header, _ in found), "outside XLA's fast library"


def test_nothing_of_size_seq_times_seq_is_kept():
    """Between the forward and the backward pass: what crosses is at most the scores' block."""
    config = replace(MODELS["gpt2"], block_size=1024)
    model = GPT.init(config, key=jax.random.key(0))
    tokens = jnp.zeros((1, 1024), jnp.int32)

    def loss(model: GPT) -> jax.Array:
        return jnp.sum(model.hidden(tokens)[0])

    _, pull = jax.vjp(loss, model)
    sizes = [x.size for x in jax.tree.leaves(pull) if hasattr(x, "size")]
    assert max(sizes) < 1024 * 1024
