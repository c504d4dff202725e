"""Training on a mesh: the losses of one device, the memory and the collectives of a mesh.

One process with eight devices answers for what computes (tests/eight_devices_train.py).
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT
from eqx_gpt.tree import count_params
from scripts.benchmarks.meshes import MODELS, N_SEQUENCE, SEQ, shapes_of
from train.config import TrainConfig
from train.devices import Execution
from train.mesh import choose_mesh, describe_mesh

N_LAYER, D, D_FF, VOCAB = 2, 56, 224, 296


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = Path(__file__).with_name("eight_devices_train.py")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path_factory.mktemp("checkpoints"))],
        env={**os.environ, **flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    process_index: int
    id: int
    platform: str


def devices(n_process: int, n_local: int, platform: str = "gpu") -> list[Any]:
    return [Device(p, 8 * p + i, platform) for p in range(n_process) for i in range(n_local)]


def test_losses_are_those_of_one_device(found: dict[str, Any]) -> None:
    """And the windows read are the same ones, or the difference would be inf."""
    assert found["apart"].keys() == {
        "gpt2, on the mesh with tiles of its vocabulary",
        "packed, with adapters, heads not divided",
        "data alone, packed, with dropout, in micro-batches",
    }
    assert all(apart < 1e-5 for apart in found["apart"].values()), found["apart"]


def test_a_run_resumes_on_another_mesh(found: dict[str, Any]) -> None:
    assert found["resumed"].keys() == {"1 -> 8", "8 -> 2"}
    assert all(apart < 1e-5 for apart in found["resumed"].values()), found["resumed"]


def test_an_evaluation_takes_batches_that_the_mesh_does_not_divide(found: dict[str, Any]) -> None:
    alone, on_mesh = found["evaluated"]
    assert on_mesh == pytest.approx(alone, rel=1e-6)


def test_after_its_steps_a_model_and_its_moments_still_lie_as_the_table_says(
    found: dict[str, Any],
) -> None:
    """By hand: what fsdp splits is an eighth, and everything keeps its layers."""
    for shape in (0, 1):  # of the weights and of the moments
        shards = {name: shapes[shape] for name, shapes in found["where"].items()}
        assert shards["wte.weight"] == [VOCAB, D // 8]
        assert shards["blocks.attention.qkv.weight"] == [N_LAYER, 3 * D, D // 8]
        assert shards["blocks.attention.out.weight"] == [N_LAYER, D // 8, D]
        assert shards["blocks.mlp.down.weight"] == [N_LAYER, D // 8, D_FF]
        assert shards["blocks.norm1.weight"] == [N_LAYER, D]


def test_no_device_holds_the_whole_state_while_it_is_made(found: dict[str, Any]) -> None:
    assert found["init"]["device"] < found["init"]["whole"] / 2


def sizes(shapes: list[str]) -> list[int]:
    dims = [re.findall(r"\d+", shape.partition("[")[2]) for shape in shapes]
    return [math.prod(map(int, of_one)) for of_one in dims]


def test_fsdp_gathers_one_layer_at_a_time(found: dict[str, Any]) -> None:
    collectives = found["programs"]["fsdp=8"]
    weights = {(3 * D, D), (D, D), (D_FF, D), (D, D_FF)}
    gathered = [tuple(map(int, re.findall(r"\d+", s.partition("[")[2])))
                for s in collectives["all-gather"]]  # fmt: skip
    # Once in the loop over the layers forward, and again in the one backward.
    assert all(gathered.count(weight) == 2 for weight in weights), gathered
    assert all(math.prod(shape) <= max(D * D_FF, VOCAB * D) for shape in gathered), gathered
    # Nothing of a batch crosses the mesh: only gradients and scalars are summed.
    per_batch = (N_SEQUENCE // 8) * SEQ * D
    summed = collectives["all-reduce"] + collectives["reduce-scatter"]
    assert per_batch not in sizes(summed) + sizes(collectives["all-gather"])
    assert sizes(collectives["reduce-scatter"]) == [VOCAB * D // 8]  # the head's, once
    assert "all-to-all" not in collectives
    assert "collective-permute" not in collectives


def test_tensor_parallelism_moves_activations_and_no_weight(found: dict[str, Any]) -> None:
    """Megatron-LM's: a sum behind attention and one behind the mlp, forward and backward."""
    collectives = found["programs"]["tensor=8"]
    batch = N_SEQUENCE * SEQ * D
    # The loops over layers hold two each; the embedding forward and the head backward one.
    assert 4 <= sizes(collectives["all-reduce"]).count(batch) <= 6
    moved = [s for kind in ("all-gather", "all-to-all", "collective-permute")
             for s in collectives.get(kind, [])]  # fmt: skip
    # Queries, keys and values, for the rows of qkv are not theirs by device: by position and head.
    assert moved
    assert all(f",{SEQ}," in s and s.endswith(f",{D // 8}]") for s in moved), moved


def test_devices_that_split_the_data_alone_meet_once_a_step(found: dict[str, Any]) -> None:
    """To average their gradients and the loss."""
    collectives = found["programs"]["data=8"]
    assert collectives.keys() == {"all-reduce"}
    n_param = count_params(GPT.init(MODELS["gpt2"], key=jax.random.key(0)))
    assert sum(sizes(collectives["all-reduce"])) == n_param + 1


def test_the_cores_of_a_cpu_split_the_data() -> None:
    mesh = choose_mesh(None, 24, devices(1, 8, "cpu"))
    assert mesh is not None
    assert dict(mesh.shape) == {"data": 8}


def test_the_default_mesh() -> None:
    """data over processes, fsdp within; a single process leaves devices idle that do not divide."""
    assert choose_mesh(None, 7, devices(1, 1)) is None
    cases = [((1, 8), 24, (1, 8)), ((1, 8), 12, (1, 6)), ((2, 4), 24, (2, 4)), ((4, 1), 12, (4, 1))]
    for (n_process, n_local), n_sequence, expected in cases:
        mesh = choose_mesh(None, n_sequence, devices(n_process, n_local))
        assert mesh is not None
        assert mesh.devices.shape == expected
        rows = mesh.devices.tolist()
        assert all(len({device.process_index for device in row}) == 1 for row in rows)


@pytest.mark.parametrize(
    ("mesh", "n_sequence", "words"),
    [
        ("data=2,fsdp=2", 24, r"mesh='data=2,fsdp=2' is of 4 devices, here are 8; give sizes"),
        ("fsdp=8", 12, r"= 12 sequences are not split evenly over mesh='fsdp=8', 8 parts"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh: str, n_sequence: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_mesh(TrainConfig(mesh=mesh).mesh_shape, n_sequence, devices(1, 8))
    with pytest.raises(ValueError, match="= 12 sequences are not split evenly"):
        choose_mesh(None, 12, devices(2, 4))


@pytest.mark.parametrize("mesh", ["data=0", "rows=2", "data=2,data=4", "data", "", "8"])
def test_a_mesh_that_is_none_is_refused(mesh: str) -> None:
    with pytest.raises(ValueError, match="give sizes of data, fsdp and tensor, each once"):
        TrainConfig(mesh=mesh)


def test_heads_that_the_mesh_does_not_divide_are_said() -> None:
    mesh = choose_mesh({"tensor": 8}, 24, devices(1, 8))
    assert describe_mesh(mesh, MODELS["gpt2"]).startswith(", mesh tensor=8")
    said = describe_mesh(mesh, MODELS["rotary"])
    assert "tensor=8 does not divide the model's 12 heads and 4 key-value heads" in said


@pytest.mark.parametrize(
    ("n_embd", "n_parts", "micro"),
    [(384, 1, 16), (384, 2, 4), (384, 4, 8), (768, 1, 48), (768, 2, 48)],
)
def test_on_a_cpu_the_micro_batches_of_small_models_stay_in_its_caches(
    monkeypatch: pytest.MonkeyPatch, n_embd: int, n_parts: int, micro: int
) -> None:
    """1024 tokens a core; alone on one, 512."""
    monkeypatch.setattr("train.cores.usable_cores", lambda: 4)
    config = TrainConfig(batch_size=48, gradient_accumulation_steps=1, block_size=256)
    model = GPTConfig(n_embd=n_embd)
    execution = Execution.choose(config, model, 10**6, "cpu", n_parts=n_parts)
    assert execution.micro_batch_size == micro
    assert execution.accumulate == "device"


def test_micro_batches_fit_the_mesh_at_the_same_global_batch() -> None:
    config = TrainConfig(batch_size=6, gradient_accumulation_steps=10)
    model = GPTConfig()
    for n_parts, micro in ((1, 6), (2, 12), (4, 20), (10, 60), (15, 60)):
        execution = Execution.choose(config, model, 10**8, "gpu", n_parts=n_parts)
        assert (execution.micro_batch_size, execution.n_micro) == (micro, 60 // micro)
    on_cpu = Execution.choose(config, model, 10**8, "cpu", n_parts=4)
    assert on_cpu.micro_batch_size % 4 == 0
    config = dataclasses.replace(config, micro_batch_size=3)
    with pytest.raises(ValueError, match=r"micro_batch_size=3 .* give a multiple of 4"):
        Execution.choose(config, model, 10**8, "gpu", n_parts=4)


@pytest.mark.parametrize(
    ("platform", "change", "meshed", "straight"),
    [
        ("cpu", {}, True, True),
        ("gpu", {}, False, True),
        ("gpu", {}, True, False),  # of `tensor` alone: one part
        ("gpu", {"remat": "block"}, False, False),
        ("tpu", {}, False, False),
    ],
    ids=str,
)
def test_where_layers_are_straight_code(platform, change, meshed, straight) -> None:
    model = GPTConfig(**change)
    found = Execution.choose(TrainConfig(), model, 10**8, platform, meshed=meshed)
    assert found.unroll == (model.n_layer if straight else 1)
    split = Execution.choose(TrainConfig(), model, 10**8, platform, n_parts=2)
    assert split.unroll == (model.n_layer if platform == "cpu" else 1)


def test_every_mesh_of_eight_is_measured() -> None:
    found = [tuple(shape.values()) for shape in shapes_of(8)]
    assert len(set(found)) == 10
    assert all(np.prod(shape) == 8 for shape in found)
