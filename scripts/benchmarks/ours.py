"""This repository as a contender: the step, the decoding and the loading that its users get."""

import dataclasses
import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import eqx_gpt
from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT
from scripts.benchmarks.job import Job
from scripts.benchmarks.serve import Prepared, timed
from scripts.cpu_devices import prepare_training
from train.config import TrainConfig
from train.devices import Execution
from train.mesh import cores_mesh, n_parts, on_every_device, placed, where_windows_lie
from train.metrics import flops_per_token
from train.optimizer import make_optimizer
from train.step import (
    Gradients,
    Recipe,
    TrainState,
    add_gradients,
    apply_gradients,
    compile_step,
    train_step,
)
from weights import from_pretrained


def prepare(job: Job, settings: dict[str, Any]) -> Prepared:
    """Settings: `precision` of training, `quantize` of decoding, `ops` kernels or reference."""
    if settings.get("ops") == "reference":
        _use_reference_ops()
    task = {"train": _train, "prefill": _prefill, "decode": _decode, "load": _load}[job.task]
    prepared = task(job, settings)
    return Prepared(prepared.run, {"device": jax.devices()[0].device_kind, **prepared.facts})


def _use_reference_ops() -> None:
    """What XLA makes of the plain formulas: every op takes its way for any platform."""
    platform: Any = importlib.import_module("eqx_gpt.ops.platform")
    kernels = platform.by_platform

    def plain(*args: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
        return default(*args)

    for name, module in list(sys.modules.items()):
        if name.startswith("eqx_gpt") and getattr(module, "by_platform", None) is kernels:
            vars(module)["by_platform"] = plain


def _train(job: Job, settings: dict[str, Any]) -> Prepared:
    """The optimizer step of `train/loop.py`, on one batch of random tokens again and again."""
    model_cfg = dataclasses.replace(GPTConfig.from_dict(job.config), dropout=0.0)
    config = TrainConfig(
        batch_size=job.batch_size,
        gradient_accumulation_steps=1,
        block_size=job.seq,
        n_embd=model_cfg.n_embd,
        precision=settings.get("precision", "auto"),
    )
    prepare_training(config)
    mesh = cores_mesh(config)  # of GPUs one, as the peers take
    if mesh is not None:
        jax.set_mesh(mesh)  # for the rest of this process
    skeleton = eqx.filter_eval_shape(lambda: GPT.init(model_cfg, key=jax.random.key(0)))
    n_params = eqx_gpt.count_params(skeleton)
    backend, meshed = jax.default_backend(), mesh is not None
    execution = Execution.choose(config, model_cfg, n_params, backend, 0, n_parts(mesh), meshed)
    model_cfg = dataclasses.replace(model_cfg, unroll=execution.unroll)
    optimizer = make_optimizer(config)
    key = on_every_device(jax.random.key(0), mesh)
    recipe = Recipe(optimizer, execution.dtype, key, products=execution.products)
    new = eqx.filter_jit(
        lambda key: placed(TrainState.init(GPT.init(model_cfg, key=key), optimizer))
    )
    state = new(jax.random.key(1))
    shape = (execution.n_micro, execution.micro_batch_size, job.seq + 1)
    windows = jax.random.randint(jax.random.key(2), shape, 0, model_cfg.real_vocab_size)
    windows = jax.device_put(windows, where_windows_lie(mesh))
    compile_step(recipe, windows, state, execution.accumulate)

    def step(state: TrainState) -> tuple[TrainState, Any]:
        if execution.accumulate == "device":
            return train_step((recipe, windows), state)
        gradients = Gradients.zero(state.model)
        for i in range(execution.n_micro):
            gradients = add_gradients((recipe, windows[i], state), gradients)
            gradients.loss.block_until_ready()  # it is shown
        return apply_gradients(recipe, gradients, state)

    def run(n: int) -> tuple[float, float]:
        nonlocal state
        previous: Any = None
        start = time.perf_counter()
        for _ in range(n):
            state, metrics = step(state)
            jax.block_until_ready(previous)
            previous = metrics
        jax.block_until_ready(previous)
        return time.perf_counter() - start, n * job.batch_size * job.seq

    facts = {
        "params": n_params,
        "dtype": jnp.dtype(execution.dtype).name,
        "flops_per_token": flops_per_token(n_params, model_cfg.n_layer, model_cfg.n_embd, job.seq),
        "micro_batches": execution.n_micro,
    }
    return Prepared(run, facts)


def _model(job: Job, quantize: str | None) -> GPT:
    """The model as decoding wants it."""
    if job.source is None:
        new = eqx.filter_jit(lambda key: GPT.init(GPTConfig.from_dict(job.config), key=key))
        model = new(jax.random.key(0))
    else:
        model = from_pretrained(job.source)
    return eqx_gpt.for_inference(model, quantize=quantize)


def _prompt(job: Job, config: GPTConfig) -> Array:
    shape = (job.batch_size, job.seq)
    return jax.random.randint(jax.random.key(1), shape, 0, config.real_vocab_size)


def _inference_facts(job: Job, model: GPT, quantize: str | None) -> dict[str, Any]:
    """A decoded token reads every weight but an embedding that is only looked up.

    The forward pass is a third of a training step's operations, and the head's are left out: a
    prefill computes it at one position.
    """
    config = model.config
    head = model.wte if model.head is None else model.head
    read = jax.tree.leaves(eqx.filter((model.blocks, model.norm, head), eqx.is_array))
    skeleton = eqx.filter_eval_shape(lambda: GPT.init(config, key=jax.random.key(0)))
    in_blocks = eqx_gpt.count_params(skeleton.blocks)
    return {
        "params": eqx_gpt.count_params(skeleton),
        "dtype": quantize or "bfloat16",
        "flops_per_token": flops_per_token(in_blocks, config.n_layer, config.n_embd, job.seq) / 3,
        "bytes_per_token": sum(x.nbytes for x in read) / job.batch_size,
    }


def _prefill(job: Job, settings: dict[str, Any]) -> Prepared:
    """From a prompt to the first new token."""
    model = _model(job, settings.get("quantize"))
    prompt = _prompt(job, model.config)
    tokens = job.batch_size * job.seq

    def run(n: int) -> tuple[float, float]:
        def work() -> None:
            for _ in range(n):
                eqx_gpt.generate(model, prompt, 1, temperature=0).block_until_ready()

        return timed(work, n * tokens)

    return Prepared(run, _inference_facts(job, model, settings.get("quantize")))


def _decode(job: Job, settings: dict[str, Any]) -> Prepared:
    """New tokens after the first: the time of one more than `new_tokens`, less that of one."""
    model = _model(job, settings.get("quantize"))
    prompt = _prompt(job, model.config)
    sample = partial(
        eqx_gpt.generate, model, prompt, key=jax.random.key(2),
        temperature=job.temperature, top_k=job.top_k,
    )  # fmt: skip

    def run(n: int) -> tuple[float, float]:
        seconds = 0.0
        for _ in range(n):
            seconds -= timed(lambda: sample(max_new_tokens=1).block_until_ready(), 0)[0]
            long = timed(lambda: sample(max_new_tokens=job.new_tokens + 1).block_until_ready(), 0)
            seconds += long[0]
        return seconds, n * job.batch_size * job.new_tokens

    return Prepared(run, _inference_facts(job, model, settings.get("quantize")))


def _load(job: Job, settings: dict[str, Any]) -> Prepared:
    """From files that the system has in memory to a model whose every number is there."""
    assert job.source is not None
    load = partial(from_pretrained, job.source, dtype="float32")
    n_params = eqx_gpt.count_params(load())

    def run(n: int) -> tuple[float, float]:
        def work() -> None:
            for _ in range(n):
                jax.block_until_ready(load())

        return timed(work, n * 4 * n_params)

    return Prepared(run, {"params": n_params, "dtype": "float32"})
