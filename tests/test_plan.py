"""Plans: arithmetic done by hand, what the compiler says, and settings known to spoil runs."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from tiny_run import command, make_dataset, run

from eqx_gpt import get_config
from eqx_gpt.tree import count_params
from scripts.planning.known import with_chosen_batch
from train.accelerators import ACCELERATORS, parse_devices
from train.collectives import compiled_traffic, count, shrunk
from train.config import TrainConfig, model_config
from train.plan import plan_for, plan_here, planned_model
from train.presets import PRESETS
from train.resolve import without_auto
from train.start import skeleton
from train.traps import traps

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = TrainConfig(
    n_layer=3, n_head=2, n_embd=14, block_size=13, batch_size=6, gradient_accumulation_steps=2,
    max_iters=100, lr_decay_iters=100, warmup_iters=3, dataset="shakespeare_char",
)  # fmt: skip


def params_of(config: TrainConfig, n_token: int = 50257) -> int:
    return count_params(skeleton(config, model_config(config, n_token), jnp.float32).model)


@pytest.mark.parametrize("name", ["gpt2-small", "gpt2-medium", "gpt2-xl"])
def test_memory_elsewhere_is_that_of_the_books(name: str) -> None:
    """16 bytes a parameter (ZeRO, arXiv:1910.02054, section 3, in float32), 2 for the copy; and of
    each layer and token about 34 d bytes (Korthikanti et al., arXiv:2205.05198, section 4, without
    the scores, which are made anew)."""
    config = dataclasses.replace(PRESETS[name], mesh="data=8", remat="none")
    plan = plan_for("h100:8", config, model_config(config, 50257))
    n = params_of(config)
    state, copy, kept, _ = plan.memory.values()
    assert state == pytest.approx(16 * n, rel=1e-3)
    assert copy == 2 * n
    rows = plan.micro_batch_size // 8
    book = 34 * config.n_layer * config.n_embd * config.block_size * rows
    assert kept == pytest.approx(book, rel=0.3)
    assert plan.n_micro * plan.micro_batch_size == config.global_batch_size
    assert plan.fits


def test_time_and_money_elsewhere() -> None:
    """By hand: 6 N + 12 L d T operations a token, at 45 % of eight times 312 TFLOP/s."""
    config = PRESETS["gpt2-small"]
    plan = plan_for("a100:8", config, model_config(config, 50257), dollars_per_hour=2.5)
    a_token = 6 * params_of(config) + 12 * 12 * 768 * 1024
    seconds = 480 * 1024 * a_token / (8 * 0.45 * 312e12)
    assert plan.step_s == pytest.approx(seconds, rel=0.05)  # and what the update reads and writes
    assert plan.dollars == pytest.approx(plan.step_s * 600_000 / 3600 * 8 * 2.5)
    one = plan_for("a100", config, model_config(config, 50257))
    assert one.step_s == pytest.approx(8 * plan.step_s, rel=0.05)


def test_a_model_too_large_for_one_device_is_split() -> None:
    config = PRESETS["gpt2-xl"]
    # Where both fit, what the update reads and writes decides.
    assert plan_for("h100:8", config, model_config(config, 50257)).mesh == {"fsdp": 8}
    split = plan_for("rtx4090:8", config, model_config(config, 50257))
    assert split.mesh == {"fsdp": 8}
    assert split.fits
    assert not plan_for("rtx4090", config, model_config(config, 50257)).fits


def test_the_layout_is_chosen_at_a_fixed_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are made again only where they do not fit, for that takes arithmetic."""
    sizes = {"none": 25e9, "block": 2e9, "dots": 3e9}
    monkeypatch.setattr("train.plan._bytes_of_a_row", lambda config, model_cfg, remat: sizes[remat])
    model_cfg = model_config(SMALL, 65)
    roomy, tight = plan_for("h100", SMALL, model_cfg), plan_for("l4", SMALL, model_cfg)
    asked = plan_for("h100", dataclasses.replace(SMALL, remat="dots"), model_cfg)
    assert (roomy.remat, tight.remat, asked.remat) == ("none", "block", "dots")
    assert (roomy.micro_batch_size, tight.micro_batch_size) == (2, 6)
    for plan in (roomy, tight, asked):
        assert plan.fits
        assert plan.n_micro * plan.micro_batch_size == SMALL.global_batch_size


def test_here_less_is_kept_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def memory(config: TrainConfig, model_cfg: Any, execution: Any) -> dict[str, float]:
        assert model_cfg.remat == config.remat
        asked.append((execution.micro_batch_size, config.remat))
        return {"all": 100.0 * execution.micro_batch_size / (2 if config.remat == "block" else 1)}

    monkeypatch.setattr("train.plan._compiled_memory", memory)
    monkeypatch.setattr("train.plan._memory_here", lambda: 60.0)
    chosen = with_chosen_batch(SMALL)
    assert (chosen.batch_size, chosen.gradient_accumulation_steps) == (1, 12)
    assert chosen.remat == "block"
    assert asked[:2] == [(12, "none"), (6, "none")]
    assert asked[-1] == (1, "block")


def test_a_mesh_of_ones_own() -> None:
    config = dataclasses.replace(PRESETS["gpt2-xl"], mesh="data=2,fsdp=2,tensor=2")
    plan = plan_for("h100:8", config, model_config(config, 50257))
    assert plan.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    assert plan.n_micro * plan.micro_batch_size == 480
    state = plan.memory["parameters, optimizer, gradients"]
    assert state == pytest.approx(16 * params_of(config) / 4, rel=1e-3)


HLO = """
  %p = f32[12,7]{1,0} parameter(0)
  %all-gather.1 = bf16[24,10]{1,0} all-gather(%c), replica_groups={{0,1,2,3}}, dimensions={0}
  %all-reduce.2 = f32[100]{0} all-reduce(%g), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%s
  ROOT %ar.3 = (f32[8]{0}, bf16[6]{0}) all-reduce-start(%x, %y), replica_groups=[2,2]<=[4]
  %all-reduce.4 = f32[64]{0} all-reduce(%h), replica_groups={{0,1}}, to_apply=%s
  %slice = f32[32]{0} dynamic-slice(%all-reduce.4, %i), dynamic_slice_sizes={32}
  %cp = f32[11]{0} collective-permute(%z), source_target_pairs={{0,1}}
"""


def test_what_is_sent_is_counted() -> None:
    """By hand: bytes of the results, by how much of them each of a ring's devices sends."""
    assert count(HLO) == {
        "all-gather": 3 / 4 * 2 * 240,
        "all-reduce": 2 * 3 / 4 * 400 + 2 * 1 / 2 * (32 + 12),
        "reduce-scatter": 1 / 2 * 256,  # each goes on with its half of the sum
        "collective-permute": 44.0,
    }
    assert shrunk({"data": 64, "fsdp": 8}) == {"data": 8, "fsdp": 8}
    assert shrunk({"fsdp": 8, "tensor": 1}) == {"fsdp": 8}


@pytest.mark.parametrize("mesh", [{"data": 2}, {"fsdp": 2}])
def test_a_step_is_compiled_for_devices_that_are_not_here(mesh: dict[str, int]) -> None:
    """Of a deep model nearly all is its layers'. Gradients in float32 are summed, once a step, or
    in each micro-batch scattered, and weights in bfloat16 gathered for the forward and the backward
    pass: of two devices each sends 4 bytes a parameter either way."""
    deep = dataclasses.replace(SMALL, n_layer=1000, n_embd=32)
    found = compiled_traffic(deep, model_config(deep, 65), mesh, 3, 2)
    times = 1 if "data" in mesh else 2
    assert found.total == pytest.approx(times * 4 * params_of(deep, 65), rel=0.03)
    (plan,) = [
        plan_for("h100:2", dataclasses.replace(deep, mesh=f"{axis}=2"), model_config(deep, 65),
                 traffic=lambda *_: found)
        for axis in mesh
    ]  # fmt: skip
    assert any("compiled for this mesh on virtual devices" in line for line in plan.assumptions)


def test_here_the_compiler_is_asked() -> None:
    said: list[str] = []
    model_cfg = model_config(SMALL, 65)
    plan = plan_here(SMALL, model_cfg, say=said.append)
    n = params_of(SMALL, 65)
    state = plan.memory["parameters, optimizer, gradients, data"]
    assert 12 * n < state < 17 * n + 8192  # parameters and two moments; also the gradients
    assert plan.memory["temporary"] > 0
    assert plan.n_micro * plan.micro_batch_size == 12
    assert 0 < plan.step_s < 5
    assert plan.run_s == pytest.approx(100 * plan.step_s)
    assert plan.tokens_per_s == pytest.approx(12 * 13 / plan.step_s)
    assert said


def test_the_flag_auto() -> None:
    for argv in (["--batch_size", "auto"], ["--batch-size=auto"]):
        assert without_auto(["--seed", "1", *argv, "--n_layer=2"]) == (
            ["--seed", "1", "--n_layer=2"], True,
        )  # fmt: skip
    assert without_auto(["--batch_size", "4"]) == (["--batch_size", "4"], False)
    chosen = with_chosen_batch(SMALL)
    assert (chosen.batch_size, chosen.gradient_accumulation_steps) == (12, 1)


def test_the_chooser_keeps_the_global_batch() -> None:
    plan = plan_here(SMALL, model_config(SMALL, 65), auto=True)
    assert (plan.micro_batch_size, plan.n_micro) == (12, 1)


def test_a_pretrained_model_is_cropped_as_the_run_does() -> None:
    gpt2, llama = get_config("gpt2"), get_config("smollm2-135m")
    config = dataclasses.replace(SMALL, block_size=128, dropout=0.1)
    assert planned_model(config, 50257, gpt2).block_size == 128
    assert planned_model(config, 50257, llama).block_size == llama.block_size
    assert planned_model(config, 50257, gpt2).dropout == 0.1


def test_devices_are_named() -> None:
    assert parse_devices("h100:8") == ("h100", ACCELERATORS["h100"], 8)
    assert parse_devices("tpu-v5e")[2] == 1
    for text, match in (("h10", "h100"), ("h100:", "h100:8"), ("h100:0", "h100:8")):
        with pytest.raises(ValueError, match=match):
            parse_devices(text)
    config = dataclasses.replace(SMALL, mesh="data=2")
    with pytest.raises(ValueError, match="is not of 4 devices"):
        plan_for("h100:4", config, model_config(SMALL, 65))
    with pytest.raises(ValueError, match="7 devices do not divide the 12 sequences"):
        plan_for("h100:7", SMALL, model_config(SMALL, 65))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_no_traps(name: str) -> None:
    config = PRESETS[name]
    if config.init_from == "scratch":
        assert traps(config, config, params_of(config), None) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gradient_accumulation_steps": 5}, "square-root rule"),
        ({"gradient_accumulation_steps": 5, "learning_rate": 2e-4}, "another"),
        ({"learning_rate": 6e-3}, "times the recipe's"),
        ({"learning_rate": 6e-5}, "times the recipe's"),
        ({"max_iters": 1000}, "has not come down at the end"),
        ({"max_iters": 2_000_000}, "runs at min_lr"),
        ({"warmup_iters": 0}, "no warm-up"),
        ({"weight_decay": 1.0}, "weight_decay"),
        ({"grad_clip": 0.0}, "not clipped"),
        ({"min_lr": 1e-3}, "rises to the end"),
    ],
)
def test_traps_are_named(change: dict[str, float], match: str) -> None:
    recipe = PRESETS["gpt2-small"]
    config = dataclasses.replace(recipe, **change)
    (found,) = (t for t in traps(config, recipe, 124_373_760, None) if match in t.text)
    assert found.name in {*change, "tokens_per_step", "lr_decay_iters", "min_lr"}


def test_few_tokens_read_often() -> None:
    config = PRESETS["gpt2-small"]
    (found,) = traps(config, config, 124_373_760, 9_000_000)
    assert f"{math.floor(480 * 1024 * 600_000 / 9e6):,} times" in found.text
    char = PRESETS["shakespeare-char"]
    assert traps(char, char, 10_700_000, 1_003_854) == []  # dropout is for that
    # 73 tokens a parameter are not learnt by heart in 33 readings, and an evaluation learns none.
    assert traps(config, config, 124_373_760, 9_035_582_198) == []
    evaluated = PRESETS["eval-gpt2-xl"]
    assert traps(evaluated, evaluated, 1_557_611_200, 4_000_000) == []


def test_the_command(tmp_path: Path) -> None:
    data_dir = make_dataset(tmp_path / "data")
    flags = {"dataset": "tiny", "data_dir": data_dir, "block_size": 13, "n_layer": 1, "n_head": 2}
    argv = command("plan.py", device="h100:2", n_embd=14, **flags)
    done = run(argv, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["n_device"] == 2
    assert "WATCH OUT" in done.stdout
    assert found["traps"]
    mistakes = ({"device": "h101"}, "did you mean"), ({"preset": "gpt2-smal"}, "gpt2-small")
    for wrong, match in mistakes:
        done = run(command("plan.py", **{"device": "h100", **wrong}), tmp_path)
        assert done.returncode == 2
        assert match in done.stderr
        assert "Traceback" not in done.stderr
