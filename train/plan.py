"""What a run will need: memory, time and money, before anything runs.

For the machine that asks (`plan_here`) the very programs of the run are compiled for shapes alone,
and the compiler says what they take; steps of a model of few layers are timed, and the rest is
arithmetic, for layers are alike. For other devices (`plan_for`), which nothing can be compiled for
where they are not, the traced program and the maker's data sheet give an estimate.
"""

import dataclasses
import math
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from eqx_gpt.config import GPTConfig
from eqx_gpt.tree import count_params
from train.accelerators import parse_devices
from train.config import TrainConfig, model_config
from train.devices import Execution
from train.loss import next_token_loss
from train.metrics import flops_per_token
from train.start import as_trained, computing, new_state, recipe, skeleton
from train.step import (
    Gradients,
    TrainState,
    add_gradients,
    apply_added,
    apply_gradients,
    train_step,
)

MFU = 0.45
"""Of published figures, 35 to 65 %: levanter, midGPT, nanochat, MaxText."""
USABLE = 0.92
"""Of an accelerator's memory; the rest is its driver's, the compiler's, and fragments."""
_ENOUGH_TOKENS = 2**16  # a device that computes so many at once is no faster for more
_TIMED_LAYERS = 4
_SAY = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How a run is to be laid out, and what it will need then.

    - `micro_batch_size`: sequences at once, on all devices together.
    - `mesh`: devices along each axis.
    - `memory`: bytes on each device, by what they are for; `room`: what a device has, None if that
      is not known.
    - `step_s`, `run_s`: seconds of a step, of all steps; evaluations and checkpoints come on top.
    - `dollars`: for all devices, None where there is no price.
    - `basis`: whether the compiler and a stopwatch were asked.
    """

    device: str
    n_device: int
    basis: Literal["measured", "estimated"]
    n_params: int
    micro_batch_size: int
    n_micro: int
    mesh: dict[str, int]
    memory: dict[str, float]
    room: float | None
    step_s: float
    run_s: float
    tokens_per_s: float
    mfu: float | None
    dollars: float | None
    assumptions: tuple[str, ...]

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.room is None or self.total_memory <= self.room

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "total_memory": self.total_memory, "fits": self.fits}


def planned_model(config: TrainConfig, n_token: int, pretrained: GPTConfig | None) -> GPTConfig:
    """The model that a run of `config` would train, as `train.start` makes it."""
    if pretrained is None:
        return model_config(config, n_token)
    return as_trained(config, pretrained)


def plan_here(
    config: TrainConfig, model_cfg: GPTConfig, *, auto: bool = False, say: _SAY = lambda _: None
) -> Plan:
    """For this process's device.

    The micro-batch is the one that `train.py` would take; where it does not fit, or always with
    `auto`, the largest divisor of the global batch that does.
    """
    shapes = skeleton(config, model_cfg, jnp.float32)
    n_params, n_frozen = count_params(shapes.model), count_params(shapes.frozen)
    execution, memory, room = choose_layout(config, model_cfg, auto=auto, say=say)
    step_s, timed = _timed_step(config, model_cfg, execution, say)
    tokens = config.global_batch_size * config.block_size
    flops = tokens * flops_per_token(
        n_params, model_cfg.n_layer, model_cfg.n_embd, config.block_size, n_frozen
    )
    assumptions = [
        f"memory: the compiler's own account of the programs that a step runs, in "
        f"{jnp.dtype(execution.dtype).name}, and what this process holds besides; while a "
        "checkpoint is written another copy of the state may be held",
        timed,
        f"{flops:.3g} FLOP a step: 6 N + 12 L d T a token",
    ]
    if (n := jax.device_count()) > 1:
        assumptions.append(f"one device; a run takes all {n} that are here, as --mesh says")
    return Plan(
        jax.devices()[0].device_kind,
        1,
        "measured",
        n_params,
        execution.micro_batch_size,
        execution.n_micro,
        {},
        memory,
        room,
        step_s,
        step_s * config.max_iters,
        tokens / step_s,
        None,
        None,
        tuple(assumptions),
    )


def choose_layout(
    config: TrainConfig, model_cfg: GPTConfig, *, auto: bool, say: _SAY = lambda _: None
) -> tuple[Execution, dict[str, float], float | None]:
    """How a step is laid out here, what memory that takes, and what there is; see `plan_here`."""
    shapes = skeleton(config, model_cfg, jnp.float32)
    n_params, n_frozen = count_params(shapes.model), count_params(shapes.frozen)
    platform, room, layouts = jax.default_backend(), _memory_here(), _layouts(config, auto)
    while True:
        candidate = next(layouts)
        execution = Execution.choose(candidate, model_cfg, n_params, platform, n_frozen)
        say(f"compiling for micro-batches of {execution.micro_batch_size}")
        memory = _compiled_memory(candidate, model_cfg, execution)
        if execution.micro_batch_size == 1 or room is None or sum(memory.values()) <= room:
            return execution, memory, room


def plan_for(
    device: str,
    config: TrainConfig,
    model_cfg: GPTConfig,
    *,
    dollars_per_hour: float | None = None,
) -> Plan:
    """For accelerators that are not here, such as `h100:8`. ValueError for an unknown one, or for
    more devices than a step has sequences."""
    name, chip, n = parse_devices(device)
    n_sequences, asked = config.global_batch_size, config.mesh_shape
    if asked is not None and math.prod(asked.values()) != n:
        raise ValueError(f"mesh={config.mesh!r} is not of {n} devices; give another, or auto")
    # A copy of the state on each device, as long as there is room for it, costs the least.
    meshes = [{"data": n}, {"fsdp": n}] if asked is None else [asked]
    n_part = n // meshes[0].get("tensor", 1)
    if n_sequences % n_part:
        raise ValueError(
            f"{n_part} devices do not divide the {n_sequences} sequences of a step; give a number "
            "that does, or another batch_size * gradient_accumulation_steps"
        )
    shapes = skeleton(config, model_cfg, jnp.float32)
    n_params, n_frozen = count_params(shapes.model), count_params(shapes.frozen)
    state = _nbytes(shapes) + 4 * (n_params - n_frozen)  # and its gradients
    room = USABLE * chip.memory
    copy = 2 * n_params
    a_row = [_saved_bytes(config, model_cfg, rows) for rows in (1, 2)]
    per_row = a_row[1] - a_row[0]
    per_row /= n // n_part

    def parts(mesh: dict[str, int]) -> tuple[int, float, list[int]]:
        """Into how many parts the state is split, what stays on each device besides the
        activations, and how many sequences at once there is room for then."""
        split = n // mesh.get("data", 1)
        fixed = state / split + copy / min(split, 2)
        rows = [
            r
            for r in range(1, n_sequences // n_part + 1)
            if (n_sequences // n_part) % r == 0
            and (r == 1 or r * config.block_size <= _ENOUGH_TOKENS)
            and fixed + 1.25 * per_row * r <= room
        ]
        return split, fixed, rows

    mesh = next((mesh for mesh in meshes if parts(mesh)[2]), meshes[-1])
    split, fixed, rows = parts(mesh)
    row = max(rows, default=1)
    memory = {
        "parameters, optimizer, gradients": state / split,
        "the parameters in bfloat16": fixed - state / split,
        "what the backward pass needs of the forward pass": per_row * row,
        "temporary": 0.25 * per_row * row,
    }
    tokens = n_sequences * config.block_size
    n_micro = n_sequences // (n_part * row)
    flops = tokens * flops_per_token(
        n_params, model_cfg.n_layer, model_cfg.n_embd, config.block_size, n_frozen
    )
    compute_s = flops / (n * MFU * chip.flops)
    update_s = 2 * state / split / chip.bandwidth
    sent = (n - 1) / n * n_params * (8 if split == 1 else 8 * n_micro)
    link_s = sent / chip.link
    step_s = max(compute_s, link_s) + update_s
    price = chip.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    run_s = step_s * config.max_iters
    assumptions = (
        "an estimate: nothing was compiled for these devices or timed on them; what a step costs "
        "however small it is, a few milliseconds, is left out, so small models will be slower",
        f"{chip.flops / 1e12:,.0f} TFLOP/s in bfloat16, {chip.memory / 1e9:,.0f} GB at "
        f"{chip.bandwidth / 1e12:.2f} TB/s, {chip.link / 1e9:,.0f} GB/s to the others "
        f"(data sheet); {MFU:.0%} of the peak reached, {USABLE:.0%} of the memory usable",
        f"{flops:.3g} FLOP a step: 6 N + 12 L d T a token; the state is read and written once",
        f"{sent / 1e9:,.2f} GB sent a step by each device, while it computes: "
        + ("gradients summed once" if split == 1 else "weights gathered twice, gradients "
           "scattered, for each micro-batch"),
        f"${price:.2f} an hour and device",
    )  # fmt: skip
    return Plan(
        name,
        n,
        "estimated",
        n_params,
        row * n_part,
        n_micro,
        mesh,
        memory,
        room,
        step_s,
        run_s,
        tokens / step_s,
        flops / step_s / (n * chip.flops),
        run_s / 3600 * n * price,
        assumptions,
    )


def _layouts(config: TrainConfig, auto: bool) -> Iterator[TrainConfig]:
    """The config with smaller and smaller micro-batches, of the same global batch."""
    total = config.global_batch_size
    if not auto:
        yield config
    first = total if auto else config.micro_batch_size or config.batch_size
    for rows in sorted((d for d in range(1, first + 1) if total % d == 0), reverse=True):
        yield dataclasses.replace(
            config,
            batch_size=rows,
            gradient_accumulation_steps=total // rows,
            micro_batch_size=None if auto else rows,
        )


def _compiled_memory(
    config: TrainConfig, model_cfg: GPTConfig, execution: Execution
) -> dict[str, float]:
    """What lies there from step to step, what a step's programs take besides, and the process."""
    model_cfg = dataclasses.replace(model_cfg, unroll=execution.unroll)
    state = skeleton(config, model_cfg, execution.dtype)
    fixed = eqx.filter_eval_shape(recipe, config, execution.dtype, jax.random.key(0))
    shape = (execution.micro_batch_size, config.block_size + 1)
    micro = jax.ShapeDtypeStruct(shape, jnp.int32)
    if execution.accumulate == "device":
        windows = jax.ShapeDtypeStruct((execution.n_micro, *shape), jnp.int32)
        programs = [(train_step, (fixed, windows), state)]
    else:
        gradients = eqx.filter_eval_shape(Gradients.zero, state.params)
        programs = [
            (add_gradients, (fixed, micro, state), gradients),
            (apply_added, (fixed, gradients), state),
        ]
    temporary = 0.0
    for function, *arguments in programs:
        sizes = _compile(function, *arguments).memory_analysis()
        more = sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
        temporary = max(temporary, float(more))
    memory = {
        "parameters, optimizer, gradients, data": _nbytes(programs[-1][1:]),
        "temporary": temporary,
    }
    if jax.default_backend() == "cpu":
        memory["this process: Python, the compiler, its programs"] = float(_resident())
    return memory


def _compile(function: Any, *arguments: PyTree) -> Any:
    """A function that `eqx.filter_jit` made, for shapes; all but its first argument is donated."""

    def is_shape(leaf: Any) -> bool:
        return isinstance(leaf, jax.ShapeDtypeStruct)

    dynamic, static = eqx.partition(arguments, is_shape, is_leaf=is_shape)

    def call(first: PyTree, rest: PyTree) -> PyTree:
        return eqx.filter(function.__wrapped__(*eqx.combine((first, *rest), static)), eqx.is_array)

    with warnings.catch_warnings():  # gradients are given up, though nothing takes their place
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return jax.jit(call, donate_argnums=1).lower(dynamic[0], dynamic[1:]).compile()


def _timed_step(
    config: TrainConfig, model_cfg: GPTConfig, execution: Execution, say: _SAY
) -> tuple[float, str]:
    """Seconds of a step, and how they were found."""
    period = _period(model_cfg)
    few = [period, period * max(1, _TIMED_LAYERS // period)]
    if model_cfg.n_layer <= few[-1]:
        few = [model_cfg.n_layer]
    found = []
    for n_layer in few:
        say(f"timing steps of {n_layer} of its {model_cfg.n_layer} layers")
        layers = model_cfg.layers[:n_layer]
        smaller = dataclasses.replace(model_cfg, n_layer=n_layer, layers=layers)
        found.append(_seconds(config, smaller, execution))
    if len(few) == 1:
        return found[0], "time: steps of this very model, timed here now"
    of_a_layer = max(0.0, (found[1] - found[0]) / (few[1] - few[0]))
    step_s = found[0] + of_a_layer * (model_cfg.n_layer - few[0])
    return step_s, (
        f"time: steps with {few[0]} and with {few[1]} of the {model_cfg.n_layer} layers, timed "
        f"here now ({found[0]:.3g} s, {found[1]:.3g} s); each further one takes as long"
    )


def _period(model_cfg: GPTConfig) -> int:
    """After how many layers their kinds repeat."""
    layers = model_cfg.layers
    return next(
        n for n in range(1, len(layers) + 1) if layers == (layers[:n] * len(layers))[: len(layers)]
    )


def _seconds(config: TrainConfig, model_cfg: GPTConfig, execution: Execution) -> float:
    """Of a step: the median of some, or one micro-batch's times their number and an update's."""
    unroll = model_cfg.n_layer if jax.default_backend() == "cpu" else 1
    model_cfg = dataclasses.replace(model_cfg, unroll=unroll)
    fixed = recipe(config, execution.dtype, jax.random.key(0))
    state = new_state(config, model_cfg, jax.random.key(0), None)
    state = computing(state, execution.dtype)
    shape = (execution.n_micro, execution.micro_batch_size, config.block_size + 1)
    windows = jax.random.randint(jax.random.key(1), shape, 0, model_cfg.real_vocab_size)
    if execution.accumulate == "device":

        def step(state: TrainState) -> tuple[TrainState, Any]:
            return train_step((fixed, windows), state)

        return _median_seconds(step, state)[0]
    micro = windows[0]

    def add(gradients: Gradients) -> tuple[Gradients, None]:
        return add_gradients((fixed, micro, state), gradients), None

    def apply(state: TrainState) -> tuple[TrainState, Any]:
        return apply_gradients(fixed, Gradients.zero(state.params), state)

    of_micro, _ = _median_seconds(add, Gradients.zero(state.params))
    of_update, _ = _median_seconds(apply, state)
    return execution.n_micro * of_micro + of_update


def _median_seconds(step: Callable[[Any], tuple[Any, Any]], state: Any) -> tuple[float, Any]:
    """Of calls that each take what the one before gave; for a second and a half at most."""
    state, _ = jax.block_until_ready(step(state))
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1.5 and len(times) < 50):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state))
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2], state


def _saved_bytes(config: TrainConfig, model_cfg: GPTConfig, rows: int) -> float:
    """What the backward pass of so many sequences keeps of the forward pass, in bfloat16."""
    state = skeleton(config, dataclasses.replace(model_cfg, unroll=1), jnp.bfloat16)
    windows = jax.ShapeDtypeStruct((rows, config.block_size + 1), jnp.int32)

    def backward(params: PyTree, windows: Any) -> PyTree:
        def loss(params: PyTree) -> Any:
            model = eqx.combine(params, state.frozen)
            return next_token_loss(model, windows, dtype=jnp.bfloat16)

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    return _nbytes(jax.eval_shape(backward, state.params, windows))


def _nbytes(tree: PyTree) -> float:
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return float(sum(x.size * x.dtype.itemsize for x in leaves))


def _memory_here() -> float | None:
    """Bytes that a process may take on this device."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024.0 * float(lines["MemAvailable"].split()[0]) + _resident()
    except (OSError, KeyError):
        return None


def _resident() -> float:
    """Bytes that this process has taken at most so far."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
