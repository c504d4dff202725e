"""What devices send each other in a step, counted in the program that is made for their mesh.

`python -m train.collectives` compiles the step on as many virtual CPU devices, in a process of its
own, for the number of them is fixed once jax has started. What counts is the program as XLA's
partitioner leaves it, which is the same for every platform, before the CPU's own passes: these
would widen bfloat16. A model of few layers is enough, for layers are alike.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from eqx_gpt.config import GPTConfig
from train.config import TrainConfig, with_fields

MOST_DEVICES = 64
"""Of virtual ones. What each sends hardly depends on their number beyond that."""
TIMEOUT_S = 600
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "f64": 8, "s64": 8,
          "u64": 8, "s8": 1, "u8": 1, "s16": 2, "u16": 2}  # fmt: skip
_LINE = re.compile(
    rf"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>[^=]*?) (?P<kind>{'|'.join(_KINDS)})"
    r"(?:-start)?\("
)
_DUMPED = "*.jit_call.*after_spmd-partitioning*.txt"


@dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends in a step, by kind of collective."""

    sent: Mapping[str, float]
    how: str

    @property
    def total(self) -> float:
        return float(sum(self.sent.values()))


def compiled_traffic(
    config: TrainConfig, model_cfg: GPTConfig, mesh: Mapping[str, int], rows: int, n_micro: int
) -> Traffic:
    """Of a step of `n_micro` micro-batches of `rows` sequences on each part of the mesh.

    **Raises:** ValueError with the end of what the process said, should it fail, or take too long.
    """
    smaller = shrunk(mesh)
    request = {
        "config": dataclasses.asdict(config), "model": model_cfg.to_dict(), "mesh": smaller,
        "rows": rows,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_force_host_platform_device_count={math.prod(smaller.values())} "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
            f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_call "
            "--xla_dump_hlo_pass_re=spmd-partitioning"
        )
        environment = {
            **os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        }  # fmt: skip
        try:
            done = subprocess.run(
                [sys.executable, "-m", "train.collectives", folder],
                input=json.dumps(request), env=environment, capture_output=True, text=True,
                timeout=TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            text = f"compiling for a mesh of {smaller} took more than {TIMEOUT_S} s"
            raise ValueError(text) from None
    if done.returncode or not done.stdout.strip():
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ValueError(f"compiling for a mesh of {dict(mesh)} failed: {last[0]}")
    found = json.loads(done.stdout.splitlines()[-1])
    periods = model_cfg.n_layer / found["period"]
    total: dict[str, float] = defaultdict(float)
    once = smaller.keys() <= {"data"}  # gradients meet at the end of the step alone
    for part, times in (("micro", 1 if once else n_micro), ("update", 1)):
        one, two = (defaultdict(float, counts) for counts in found[part])
        for kind in {*one, *two}:
            of_period = two[kind] - one[kind]
            total[kind] += times * max(0.0, one[kind] + (periods - 1) * of_period)
    how = "counted in the step compiled for this mesh on virtual devices"
    if smaller != dict(mesh):
        how = f"counted in the step compiled for {smaller} virtual devices"
    return Traffic({kind: size for kind, size in sorted(total.items()) if size}, how)


def shrunk(mesh: Mapping[str, int]) -> dict[str, int]:
    """A mesh of the same axes, of at most MOST_DEVICES."""
    sizes = {axis: n for axis, n in mesh.items() if n > 1}
    while math.prod(sizes.values()) > MOST_DEVICES:
        largest = max(sizes, key=lambda axis: sizes[axis])
        sizes[largest] = -(-sizes[largest] // 2)
    return sizes


def count(hlo: str) -> dict[str, float]:
    """Bytes that each device sends, by kind of collective, in a partitioned program.

    By the usual rings: of a result gathered from n devices each sends (n - 1) / n, and twice that
    of one that is summed for all. A sum of which each device goes on with a slice alone is a
    reduce-scatter, as compilers for accelerators make of it.
    """
    lines = hlo.splitlines()
    sent: dict[str, float] = defaultdict(float)
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        size = float(sum(
            _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found["type"])
        ))  # fmt: skip
        n, kind = _group(line), found["kind"]
        if kind == "all-reduce" and _only_sliced(found["name"], lines):
            kind, size = "reduce-scatter", size / n
        share = (n - 1) / n if n > 1 else 0.0
        factor = {"all-reduce": 2 * share, "reduce-scatter": n * share}
        sent[kind] += size * (1.0 if kind == "collective-permute" else factor.get(kind, share))
    return dict(sent)


def _group(line: str) -> int:
    """How many devices take part, of any of the ways in which it is written."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", line):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        return math.prod(sizes.get(axis, 1) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    return 1


def _only_sliced(name: str, lines: list[str]) -> bool:
    use = re.compile(rf"%{re.escape(name)}(?![\w.\-])")
    users = [line for line in lines if use.search(line.partition(" = ")[2])]
    return bool(users) and all(" dynamic-slice(" in line for line in users)


def main() -> int:
    from train.plan import compiled, period_of

    request = json.loads(sys.stdin.read())
    folder = Path(sys.argv[1])
    config = with_fields(TrainConfig(), request["config"], "config")
    model_cfg = GPTConfig.from_dict(request["model"])
    period = period_of(model_cfg)
    found: dict[str, list[Any]] = {"micro": [], "update": []}
    for n_layer in (period, 2 * period):
        layers = (model_cfg.layers * 2)[:n_layer]
        few = dataclasses.replace(model_cfg, n_layer=n_layer, layers=layers, unroll=n_layer)
        for part, program in _programs(config, few, request["mesh"], request["rows"]).items():
            for old in folder.iterdir():
                old.unlink() if old.is_file() else None
            compiled(*program)
            (dumped,) = folder.glob(_DUMPED)
            found[part].append(count(dumped.read_text(encoding="utf-8")))
    print(json.dumps({**found, "period": period}))
    return 0


def _programs(
    config: TrainConfig, model_cfg: GPTConfig, shape: Mapping[str, int], rows: int
) -> dict[str, tuple[Any, ...]]:
    """What is called for each micro-batch, and once a step, with shapes that lie on the mesh."""
    from train.mesh import BATCH, choose_mesh, n_parts, with_shardings
    from train.start import recipe, skeleton
    from train.step import Gradients, add_gradients, apply_added

    mesh = choose_mesh(shape, config.global_batch_size * math.prod(shape.values()))
    assert mesh is not None
    jax.set_mesh(mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    state = with_shardings(skeleton(config, model_cfg, jnp.bfloat16), mesh)
    fixed: PyTree = eqx.filter_eval_shape(recipe, config, jnp.bfloat16, jax.random.key(0))
    fixed = jax.tree.map(placed, fixed)
    gradients = with_shardings(eqx.filter_eval_shape(Gradients.zero, state.params), mesh)
    split = tuple(axis for axis in BATCH if axis in mesh.shape)
    where = NamedSharding(mesh, PartitionSpec(split or None))
    windows = (rows * n_parts(mesh), config.block_size + 1)
    micro = jax.ShapeDtypeStruct(windows, jnp.int32, sharding=where)
    return {
        "micro": (add_gradients, (fixed, micro, state), gradients),
        "update": (apply_added, (fixed, gradients), state),
    }


if __name__ == "__main__":
    sys.exit(main())
