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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from eqx_gpt.config import GPTConfig
from eqx_gpt.ops.onednn import stored_if_by
from eqx_gpt.tree import count_params
from train.accelerators import Accelerator, parse_devices
from train.collectives import Traffic
from train.config import Remat, TrainConfig, model_config
from train.devices import Execution, unrolls
from train.loss import next_token_loss
from train.mesh import (
    around,
    cores_mesh,
    n_parts,
    on_every_device,
    where_windows_lie,
    with_shardings,
)
from train.metrics import flops_per_token
from train.start import as_trained, computing, new_state, recipe, skeleton
from train.step import (
    Gradients,
    add_gradients,
    apply_added,
    apply_gradients,
    compile_step,
    train_step,
)

MFU = 0.45
"""Of published figures, 35 to 65 %: levanter, midGPT, nanochat, MaxText."""
USABLE = 0.92
"""Of an accelerator's memory; the rest is its driver's, the compiler's, and fragments."""
_ENOUGH_TOKENS = 2**16  # a device that computes so many at once is no faster for more
_TIMED_LAYERS = (8, 4, 2)
_RECOMPUTED: Mapping[Remat, float] = {"none": 1.0, "dots": 1.05, "block": 4 / 3}
"""Arithmetic of a step in all: of a block it is the forward pass once more."""
_SAY = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How a run is to be laid out, and what it will need then.

    - `micro_batch_size`: sequences at once, on all devices together.
    - `mesh`: devices along each axis; `remat`: as in `TrainConfig`.
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
    remat: Remat
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
    """For this process's device, or its CPU as the several devices that a run would take.

    The micro-batch is the one that `train.py` would take; where it does not fit, or always with
    `auto`, the largest divisor of the global batch that does.
    """
    shapes = skeleton(config, model_cfg, jnp.float32)
    n_params, n_frozen = count_params(shapes.model), count_params(shapes.frozen)
    config, execution, memory, room = choose_layout(config, model_cfg, auto=auto, say=say)
    model_cfg = dataclasses.replace(model_cfg, remat=config.remat)
    mesh = cores_mesh(config)
    with around(mesh):
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
    if mesh is not None:
        assumptions.append(f"the CPU as {mesh.size} devices, each for its share of the sequences")
    elif (n := jax.device_count()) > 1:
        assumptions.append(f"one device; a run takes all {n} that are here, as --mesh says")
    return Plan(
        jax.devices()[0].device_kind,
        1,
        "measured",
        n_params,
        execution.micro_batch_size,
        execution.n_micro,
        {},
        config.remat,
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
) -> tuple[TrainConfig, Execution, dict[str, float], float | None]:
    """How a step is laid out here, what memory that takes, and what there is; see `plan_here`. The
    config is that of the layout."""
    shapes = skeleton(config, model_cfg, jnp.float32)
    n_params, n_frozen = count_params(shapes.model), count_params(shapes.frozen)
    platform, room, mesh = jax.default_backend(), _memory_here(), cores_mesh(config)
    layouts = _layouts(config, auto, n_parts(mesh))
    found: dict[Execution, tuple[TrainConfig, Execution, dict[str, float], float | None]] = {}
    for candidate in layouts:
        model_cfg = dataclasses.replace(model_cfg, remat=candidate.remat)
        execution = Execution.choose(
            candidate, model_cfg, n_params, platform, n_frozen, n_parts(mesh), mesh is not None
        )
        remat = "" if candidate.remat == "none" else f" with remat={candidate.remat}"
        say(f"compiling for micro-batches of {execution.micro_batch_size}{remat}")
        with around(mesh):
            memory = _compiled_memory(candidate, model_cfg, execution)
        found[execution] = candidate, execution, memory, room
        if room is None or sum(memory.values()) <= room:
            return found[execution]
    return min(found.values(), key=lambda layout: sum(layout[2].values()))


def plan_for(
    device: str,
    config: TrainConfig,
    model_cfg: GPTConfig,
    *,
    dollars_per_hour: float | None = None,
    traffic: Callable[[TrainConfig, GPTConfig, dict[str, int], int, int], Traffic] | None = None,
) -> Plan:
    """For accelerators that are not here, such as `h100:8`.

    Mesh and micro-batches are those with the shortest step that fit, and remat only where nothing
    fits without. `traffic` counts what
    the chosen layout sends (see `compiled_traffic`); None is a formula.

    **Raises:** ValueError for an unknown device, or for more than a step has sequences.
    """
    name, chip, n = parse_devices(device)
    n_sequences, asked = config.global_batch_size, config.mesh_shape
    if asked is not None and math.prod(asked.values()) != n:
        raise ValueError(f"mesh={config.mesh!r} is not of {n} devices; give another, or auto")
    meshes = [{"data": n}, {"fsdp": n}] if asked is None else [asked]
    n_part = n // meshes[0].get("tensor", 1)
    if n_sequences % n_part:
        raise ValueError(
            f"{n_part} devices do not divide the {n_sequences} sequences of a step; give a number "
            "that does, or another batch_size * gradient_accumulation_steps"
        )
    estimate = _Estimate.of(config, model_cfg, chip, n)
    layouts: list[_Layout] = []
    for remat in _remats(config):  # the first costs the least arithmetic
        per_row = _bytes_of_a_row(config, model_cfg, remat) / (n // n_part)
        layouts = [estimate.layout(mesh, remat, per_row) for mesh in meshes]
        if any(layout.fits for layout in layouts):
            break
    layout = min(layouts, key=lambda layout: (not layout.fits, layout.step_s))
    n_micro = n_sequences // (n_part * layout.rows)
    found = layout.traffic
    if n > 1 and traffic is not None:
        chosen = dataclasses.replace(model_cfg, remat=layout.remat)
        try:
            found = traffic(config, chosen, layout.mesh, layout.rows, n_micro)
        except ValueError as error:
            found = dataclasses.replace(found, how=f"{found.how}, because {error}")
    step_s = estimate.step_s(layout.mesh, layout.remat, found)
    tokens = n_sequences * config.block_size
    price = chip.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    run_s = step_s * config.max_iters
    assumptions = [
        "an estimate: nothing was compiled for these devices or timed on them; what a step costs "
        "however small it is, a few milliseconds, is left out, so small models will be slower",
        f"{chip.flops / 1e12:,.0f} TFLOP/s in bfloat16, {chip.memory / 1e9:,.0f} GB at "
        f"{chip.bandwidth / 1e12:.2f} TB/s, {chip.link / 1e9:,.0f} GB/s to the others "
        f"(data sheet); {MFU:.0%} of the peak reached, {USABLE:.0%} of the memory usable",
        f"{estimate.flops:.3g} FLOP a step: 6 N + 12 L d T a token; the state is read and written "
        "once",
        f"${price:.2f} an hour and device",
    ]
    if n > 1:
        kinds = ", ".join(f"{kind} {size / 1e9:,.2f}" for kind, size in found.sent.items())
        assumptions.append(
            f"{found.total / 1e9:,.2f} GB sent a step by each device, while it computes, all of "
            f"them as near as neighbours: {kinds}; {found.how}"
        )
    if layout.remat != "none":
        work = _RECOMPUTED[layout.remat] - 1
        assumptions.append(
            f"--remat {layout.remat}: activations are made again, {work:.0%} more arithmetic"
        )
    return Plan(
        name,
        n,
        "estimated",
        estimate.n_params,
        layout.rows * n_part,
        n_micro,
        layout.mesh,
        layout.remat,
        layout.memory,
        estimate.room,
        step_s,
        run_s,
        tokens / step_s,
        estimate.flops / step_s / (n * chip.flops),
        run_s / 3600 * n * price,
        tuple(assumptions),
    )


@dataclass(frozen=True)
class _Layout:
    """One way to lay out a step: `rows` sequences at once on each part of the mesh."""

    mesh: dict[str, int]
    remat: Remat
    rows: int
    memory: dict[str, float]
    fits: bool
    traffic: Traffic
    step_s: float


@dataclass(frozen=True)
class _Estimate:
    """What is known of a run on `n` chips, however it is laid out. `state` is the bytes of
    parameters, optimizer and gradients, `flops` a step's."""

    config: TrainConfig
    chip: Accelerator
    n: int
    n_params: int
    state: float
    flops: float

    @staticmethod
    def of(config: TrainConfig, model_cfg: GPTConfig, chip: Accelerator, n: int) -> "_Estimate":
        shapes = skeleton(config, model_cfg, jnp.float32)
        n_params, n_frozen = count_params(shapes.model), count_params(shapes.frozen)
        flops = (
            config.global_batch_size
            * config.block_size
            * flops_per_token(
                n_params, model_cfg.n_layer, model_cfg.n_embd, config.block_size, n_frozen
            )
        )
        state = _nbytes(shapes) + 4 * (n_params - n_frozen)
        return _Estimate(config, chip, n, n_params, state, flops)

    @property
    def room(self) -> float:
        return USABLE * self.chip.memory

    def layout(self, mesh: dict[str, int], remat: Remat, per_row: float) -> _Layout:
        """The one with most sequences at once that fits; with one sequence, if none does."""
        split = self.n // mesh.get("data", 1)
        each = self.config.global_batch_size // (self.n // mesh.get("tensor", 1))
        copy = 2 * self.n_params / min(split, 2)
        fixed = self.state / split + copy
        rows = max(
            r
            for r in range(1, each + 1)
            if each % r == 0
            and (
                r == 1
                or (
                    r * self.config.block_size <= _ENOUGH_TOKENS
                    and fixed + 1.25 * per_row * r <= self.room
                )
            )
        )
        memory = {
            "parameters, optimizer, gradients": self.state / split,
            "the parameters in bfloat16": copy,
            "what the backward pass needs of the forward pass": per_row * rows,
            "temporary": 0.25 * per_row * rows,
        }
        sent = self.by_formula(mesh, each // rows)
        fits = sum(memory.values()) <= self.room
        return _Layout(mesh, remat, rows, memory, fits, sent, self.step_s(mesh, remat, sent))

    def by_formula(self, mesh: Mapping[str, int], n_micro: int) -> Traffic:
        """Gradients summed, or weights gathered twice and gradients scattered, by rings."""
        n, data = self.n, mesh.get("data", 1)
        split, sent = n // data, {}
        if split > 1:
            share = (split - 1) / split * self.n_params * n_micro
            sent = {"all-gather": 4 * share, "reduce-scatter": 4 * share}
        if data > 1:
            times = n_micro if split > 1 else 1
            sent["all-reduce"] = 8 * (data - 1) / data * self.n_params / split * times
        return Traffic(sent, "by formula, for weights gathered and gradients summed")

    def step_s(self, mesh: Mapping[str, int], remat: Remat, traffic: Traffic) -> float:
        compute_s = self.flops * _RECOMPUTED[remat] / (self.n * MFU * self.chip.flops)
        update_s = 2 * self.state / (self.n // mesh.get("data", 1)) / self.chip.bandwidth
        return max(compute_s, traffic.total / self.chip.link) + update_s


def _remats(config: TrainConfig) -> list[Remat]:
    """What may be chosen: what was asked for, or if nothing was, to keep all or as good as none."""
    return ["none", "block"] if config.remat == "none" else [config.remat]


def _bytes_of_a_row(config: TrainConfig, model_cfg: GPTConfig, remat: Remat) -> float:
    model_cfg = dataclasses.replace(model_cfg, remat=remat)
    one, two = (_saved_bytes(config, model_cfg, rows) for rows in (1, 2))
    return two - one


def _layouts(config: TrainConfig, auto: bool, n_part: int) -> Iterator[TrainConfig]:
    """The config with smaller and smaller micro-batches, of the same global batch; and then the
    same again with less kept for the backward pass."""
    total = config.global_batch_size
    first = total if auto else config.micro_batch_size or config.batch_size
    for remat in _remats(config):
        if not auto:
            yield dataclasses.replace(config, remat=remat)
        divisors = (d for d in range(1, first + 1) if total % d == 0 and d % n_part == 0)
        for rows in sorted(divisors, reverse=True):
            yield dataclasses.replace(
                config,
                batch_size=rows,
                gradient_accumulation_steps=total // rows,
                micro_batch_size=None if auto else rows,
                remat=remat,
            )


def _compiled_memory(
    config: TrainConfig, model_cfg: GPTConfig, execution: Execution
) -> dict[str, float]:
    """What lies there from step to step, what a step's programs take besides, and the process."""
    model_cfg = dataclasses.replace(model_cfg, unroll=execution.unroll)
    mesh = cores_mesh(config)
    state = with_shardings(skeleton(config, model_cfg, execution.dtype), mesh)
    key, products = jax.random.key(0), execution.products
    fixed = eqx.filter_eval_shape(recipe, config, execution.dtype, key, products)
    shape = (execution.micro_batch_size, config.block_size + 1)
    micro = jax.ShapeDtypeStruct(shape, jnp.int32)
    if execution.accumulate == "device":
        windows = jax.ShapeDtypeStruct(
            (execution.n_micro, *shape), jnp.int32, sharding=where_windows_lie(mesh)
        )
        programs = [(train_step, (fixed, windows), state)]
    else:
        gradients = eqx.filter_eval_shape(Gradients.zero, state.params)
        programs = [
            (add_gradients, (fixed, micro, state), gradients),
            (apply_added, (fixed, gradients), state),
        ]
    temporary = 0.0
    for function, *arguments in programs:
        with stored_if_by(execution.products):
            sizes = compiled(function, *arguments).memory_analysis()
        more = sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
        temporary = max(temporary, float(more))
    n = n_parts(mesh)  # each device has all of it
    memory = {
        "parameters, optimizer, gradients, data": n * _nbytes(programs[-1][1:]),
        "temporary": n * temporary,
    }
    if jax.default_backend() == "cpu":
        memory["this process: Python, the compiler, its programs"] = float(_resident())
    return memory


def compiled(function: Any, *arguments: PyTree) -> Any:
    """A jitted function, for shapes; all but its first argument is donated."""

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
    few = _timed_layers(config, model_cfg)
    layers = " and ".join(map(str, few))
    say(f"timing steps of {layers} of its {model_cfg.n_layer} layers")
    found = _in_turn([_step_of(config, _shorter(model_cfg, n), execution) for n in few])
    if len(few) == 1:
        return found[0], "time: steps of this very model, timed here now"
    of_a_layer = (found[1] - found[0]) / (few[1] - few[0])
    if of_a_layer <= 0:  # other work on this machine hides it
        of_a_layer = found[1] / (few[1] + 1)
    step_s = found[0] + of_a_layer * (model_cfg.n_layer - few[0])
    return step_s, (
        f"time: steps with {few[0]} and with {few[1]} of the {model_cfg.n_layer} layers, timed in "
        f"turn here now ({found[0]:.3g} s, {found[1]:.3g} s); each further one takes as long"
    )


def _timed_layers(config: TrainConfig, model_cfg: GPTConfig) -> list[int]:
    """Of which models steps are timed: of a few layers, and of more, as far as they take no more
    than a quarter of the memory; of all, if they are not more."""
    period, room = period_of(model_cfg), _memory_here() or math.inf
    counts = [min(model_cfg.n_layer, period * max(2, most // period)) for most in _TIMED_LAYERS]
    more = next((n for n in counts if _state_size(config, model_cfg, n) < room / 4), counts[-1])
    return [more] if more == model_cfg.n_layer else [period, more]


def _state_size(config: TrainConfig, model_cfg: GPTConfig, n_layer: int) -> float:
    return _nbytes(skeleton(config, _shorter(model_cfg, n_layer), jnp.float32))


def _shorter(model_cfg: GPTConfig, n_layer: int) -> GPTConfig:
    unroll = n_layer if unrolls(jax.default_backend(), model_cfg.remat) else 1
    layers = model_cfg.layers[:n_layer]
    return dataclasses.replace(model_cfg, n_layer=n_layer, layers=layers, unroll=unroll)


def period_of(model_cfg: GPTConfig) -> int:
    """After how many layers their kinds repeat."""
    layers = model_cfg.layers
    return next(
        n for n in range(1, len(layers) + 1) if layers == (layers[:n] * len(layers))[: len(layers)]
    )


def _step_of(
    config: TrainConfig, model_cfg: GPTConfig, execution: Execution
) -> Callable[[], float]:
    """Each call takes a step, of arrays that it holds, and says how many seconds: the whole step,
    or as long as its micro-batches and its update take, of which one each was run."""
    mesh = cores_mesh(config)
    key = on_every_device(jax.random.key(0), mesh)
    fixed = recipe(config, execution.dtype, key, execution.products)
    state = new_state(config, model_cfg, jax.random.key(0), None)
    state = computing(state, execution.dtype)
    shape = (execution.n_micro, execution.micro_batch_size, config.block_size + 1)
    windows = jax.random.randint(jax.random.key(1), shape, 0, model_cfg.real_vocab_size)
    windows = jax.device_put(windows, where_windows_lie(mesh))

    compile_step(fixed, windows, state, execution.accumulate)

    def whole() -> float:
        nonlocal state
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train_step((fixed, windows), state))
        return time.perf_counter() - start

    def in_parts() -> float:
        nonlocal state
        gradients = jax.block_until_ready(Gradients.zero(state.params))
        start = time.perf_counter()
        gradients = jax.block_until_ready(add_gradients((fixed, windows[0], state), gradients))
        middle = time.perf_counter()
        state, _ = jax.block_until_ready(apply_gradients(fixed, gradients, state))
        return execution.n_micro * (middle - start) + time.perf_counter() - middle

    return whole if execution.accumulate == "device" else in_parts


def _in_turn(steps: list[Callable[[], float]]) -> list[float]:
    """Medians, after two calls of each to warm up: of three rounds, or as many as go into three
    seconds if these are more."""
    for step in steps:
        step()
        step()
    rounds: list[list[float]] = []
    while len(rounds) < 3 or (sum(map(sum, rounds)) < 3.0 and len(rounds) < 50):
        rounds.append([step() for step in steps])
    return [sorted(times)[len(times) // 2] for times in zip(*rounds, strict=True)]


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
