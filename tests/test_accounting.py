"""Where the time of a run goes, what its numbers are measured by, and who else is told."""

import contextlib
import dataclasses
import gzip
import json
import struct
import time
import types
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pytest
from tiny_run import FLAGS, StopAfter, make_dataset

import train.clock
import train.loop
import train.peaks
from train.checkpoint import _written
from train.clock import PHASES, Clock
from train.config import TrainConfig
from train.data import Windows
from train.loggers import numbers
from train.loop import train as run_training
from train.manifest import Manifest
from train.peaks import peak_flops, published_peak
from train.summary import account, summary

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Manifest.read(make_dataset(tmp_path_factory.mktemp("data")) / "tiny")


@pytest.fixture
def config(tmp_path):
    short = {"max_iters": 6, "eval_interval": 3, "eval_iters": 1, "checkpoint_interval": 2}
    return TrainConfig(**{**FLAGS, **short}, out_dir=str(tmp_path / "run"))


def records(config):
    lines = (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def now(monkeypatch):
    """A time that goes on only when it is told to."""
    hand = types.SimpleNamespace(s=100.0)
    monkeypatch.setattr(train.clock.time, "monotonic", lambda: hand.s)
    return hand


# The clock


def test_every_moment_belongs_to_one_phase(now):
    clock = Clock(since=97.0)
    now.s += 2
    with clock.phase("step"):
        now.s += 7
        with clock.phase("checkpoint"):
            now.s += 11
            with contextlib.suppress(ZeroDivisionError), clock.phase("other"):
                now.s += 13
                raise ZeroDivisionError
            now.s += 17
        now.s += 19
    now.s += 23
    expected = {"start": 3 + 2 + 23, "step": 7 + 19, "checkpoint": 11 + 17, "other": 13}
    assert clock.seconds() == dict.fromkeys(PHASES, 0.0) | expected
    assert clock.elapsed_s == 95.0


def test_waiting_for_an_item_is_time_of_a_phase_and_using_it_is_not(now):
    def slow():
        for i in range(3):
            now.s += 5
            yield i

    clock = Clock()
    with clock.phase("step"):
        for _ in clock.timed(slow(), "data"):
            now.s += 2
    assert (clock.seconds()["data"], clock.seconds()["step"]) == (15, 6)


def test_a_rate_is_of_training_alone(now):
    clock = Clock()
    now.s += 1000  # compiling
    for phase, seconds in (("step", 2), ("data", 1), ("log", 1), ("evaluation", 500)):
        with clock.phase(phase):
            now.s += seconds
    assert clock.rate(120) == 30
    with clock.phase("step"):
        now.s += 3
        assert clock.rate(120) == 40


def test_a_resumed_clock_goes_on(now):
    clock = Clock({"start": 5.0, "step": 8.0}, elapsed_s=13.0)
    with clock.phase("step"):
        now.s += 2
        assert clock.rate(10) == 5
    assert clock.seconds()["step"] == 10
    assert clock.elapsed_s == 15
    assert Clock(None, elapsed_s=13.0).seconds()["other"] == 13  # an earlier version's checkpoint


# Runs


def check_account(config, found):
    """Parts add up to the whole, nothing ever goes back, and work is what was done."""
    per_step = config.batch_size * config.gradient_accumulation_steps * config.block_size
    for record in found:
        parts = sum(record[f"{phase}_s"] for phase in PHASES)
        assert record["elapsed_s"] == pytest.approx(parts, abs=1e-4)
        n_step = record["iter"] + ("train_loss" in record)
        assert record["tokens"] == n_step * per_step
        assert record["flops"] == pytest.approx(record["tokens"] * flops_per_token(config))
    for name in ("elapsed_s", *(f"{phase}_s" for phase in PHASES)):
        values = [record[name] for record in found]
        assert values == sorted(values), name


def flops_per_token(config):
    """Of GPT-2's shape without biases, from the formula: weights, norms, embeddings."""
    d, n_layer, seq, vocab_size = config.n_embd, config.n_layer, config.block_size, 40
    n_params = vocab_size * d + seq * d + n_layer * (12 * d * d + 2 * d) + d
    return 6 * n_params + 12 * n_layer * d * seq


def test_the_account_of_a_run_goes_on_over_an_interruption(config, data, monkeypatch, capsys):
    config = dataclasses.replace(config, bias=False)
    assert data.vocab_size == 40
    monkeypatch.setattr(train.loop, "Interruption", lambda *_: StopAfter(4))
    assert run_training(config, data).steps_done == 3
    monkeypatch.undo()
    first = capsys.readouterr().err
    before = records(config)
    run_training(config, data, resume=True)
    found = records(config)
    assert found[: len(before)] == before
    check_account(config, found)
    assert found[-1]["start_s"] > before[-1]["start_s"] + 0.01  # compiled again
    for text, tokens in ((first, "117"), (capsys.readouterr().err, "234")):
        assert f"work {tokens} tokens" in text
        assert all(f"  {phase} " in text for phase in PHASES)


@pytest.mark.parametrize("n_micro", [1, 2])
def test_the_first_step_finds_its_program_compiled(n_micro, config, data, monkeypatch):
    """Accumulated on the host, of micro-batches that take long, on the device otherwise."""
    long = {"float32": 1.0, "bfloat16": 1.0}  # as if a micro-batch took long
    monkeypatch.setattr("train.devices._CPU_FLOPS", long)
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: events.append(event)
    )
    made = []

    def counted(function):
        def step(*args):
            n_before = len(events)
            result = jax.block_until_ready(function(*args))
            made.append([event for event in events[n_before:] if "compile" in event])
            return result

        return step

    for name in ("train_step", "add_gradients", "apply_gradients"):
        monkeypatch.setattr(train.loop, name, counted(getattr(train.loop, name)))
    config = dataclasses.replace(
        config, gradient_accumulation_steps=n_micro, micro_batch_size=config.batch_size, max_iters=2
    )
    try:
        jax.clear_caches()
        run_training(config, data)
        assert any("compile" in event for event in events)
        assert made == [[]] * (2 if n_micro == 1 else 6)
        events.clear()
        made.clear()
        jax.clear_caches()
        run_training(dataclasses.replace(config, max_iters=4), data, resume=True)
    finally:
        jax.monitoring.clear_event_listeners()
    assert any("compile" in event for event in events)
    assert made == [[]] * (2 if n_micro == 1 else 6)


def test_a_slow_dataset_and_a_slow_logger_are_seen(config, data, monkeypatch):
    batch = Windows.batch

    def slow_batch(*args):
        time.sleep(0.2)
        return batch(*args)

    def slow_log(record):
        time.sleep(0.05)

    monkeypatch.setattr(Windows, "batch", slow_batch)
    monkeypatch.setattr(train.loop, "extra_loggers", lambda *_, **__: [slow_log])
    config = dataclasses.replace(config, eval_interval=6, checkpoint_interval=6)
    run_training(config, data)
    last = records(config)[-2]
    assert last["train_loss"] > 0
    assert last["data_s"] > 0.1  # of 6 batches, three of them made while the step compiled
    assert last["log_s"] >= 0.25  # of the lines before this one


def test_the_end_of_a_run_is_told(now):
    seconds = dict.fromkeys(PHASES, 0.0) | {"start": 10.0, "step": 75.0, "data": 5.0, "other": 10.0}
    lines = summary(seconds, tokens=8000, flops=4e9, peak=1e8)
    assert lines[0] == "time 0:01:40"
    assert lines[1].split()[:4] == ["start", "10.0", "s", "10.0%"]
    assert lines[3].split()[:4] == ["step", "75.0", "s", "75.0%"]
    assert lines[-1] == "work 8,000 tokens, 4e+09 FLOPs, 100 tok/s, mfu 50.0%"
    assert "mfu" not in summary(seconds, 8000, 4e9, None)[-1]
    assert len(summary(dict.fromkeys(PHASES, 0.0), 0, 0.0, None)) == len(PHASES) + 1
    assert account(seconds, 3, 7.0)["elapsed_s"] == 100


# Peaks


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla V100-SXM2-16GB", 125),
        ("AMD Instinct MI300X", 1307),
        ("TPU v5", 459),
        ("TPU v5 lite", 197),
    ],
)
def test_peaks_go_by_the_name_of_the_device(kind, teraflops):
    assert published_peak(kind) == teraflops * 1e12


@pytest.mark.parametrize(
    "kind",
    ["NVIDIA RTX A1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU",
     "NVIDIA T400", "TPU v99", "cpu"],
)  # fmt: skip
def test_what_the_table_does_not_know_has_no_peak(kind):
    assert published_peak(kind) is None


def test_peaks_of_tpus_are_those_that_jax_knows():
    from jax._src.pallas.mosaic import tpu_info

    for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x"):
        version = tpu_info.chip_version_from_device_kind(kind)
        cores = 1 if kind == "TPU7x" else version.num_physical_tensor_cores_per_chip
        info = tpu_info.get_tpu_info_for_chip(version, cores)
        expected = info.bf16_ops_per_second * cores
        assert published_peak(kind) == pytest.approx(expected, rel=0.005), kind


def test_a_peak_is_that_of_all_devices(monkeypatch):
    def machine(platform, kind, n_device, n_process=1):
        device = types.SimpleNamespace(platform=platform, device_kind=kind)
        monkeypatch.setattr(train.peaks.jax, "devices", lambda: [device] * n_device)
        monkeypatch.setattr(train.peaks.jax, "device_count", lambda: n_device)
        monkeypatch.setattr(train.peaks.jax, "process_count", lambda: n_process)

    machine("gpu", "NVIDIA H100 80GB HBM3", 16, 2)
    assert peak_flops("bfloat16") == peak_flops("float32") == 16 * 989e12
    machine("gpu", "something new", 16)
    assert peak_flops("bfloat16") is None
    monkeypatch.setattr(train.peaks, "_measured_matmul_flops", lambda dtype: 7e9)
    machine("cpu", "cpu", 8)
    assert peak_flops("float32") == 7e9
    machine("cpu", "cpu", 8, 2)
    assert peak_flops("float32") is None


# Who else is told


def test_numbers_are_what_a_curve_can_be_drawn_of():
    record = {
        "iter": 3, "loss": 1.5, "mfu": None, "n": 7, "name": "tiny", "bad": float("nan"),
        "norm": {"wte": 2.0, "of": {"lm_head": 0.5}, "none": None},
    }  # fmt: skip
    assert numbers(record) == {"loss": 1.5, "n": 7, "norm/wte": 2.0, "norm/of/lm_head": 0.5}


def events_of(path):
    """(tag, step, value) of a TensorBoard file, read here: length, crc, record, crc."""
    from tensorboardX.proto.event_pb2 import Event

    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            yield value.tag, event.step, value.simple_value
        content = content[16 + length :]


def test_tensorboard_gets_every_number(config, data):
    config = dataclasses.replace(config, max_iters=3, tensorboard_log=True)
    run_training(config, data)
    files = sorted((Path(config.out_dir) / "tensorboard").glob("events*"))
    found = {(tag, step): value for file in files for tag, step, value in events_of(file)}
    expected = {
        (name, record["iter"]): value
        for record in records(config)
        for name, value in numbers(record).items()
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert ("tokens", 2) in found


# Checkpoints


def test_a_checkpoint_does_not_hold_what_the_next_step_takes_over(getkey):
    """On CPUs Orbax reads arrays in place, and donating them would wait until they are written."""
    tree = {"a": jax.random.normal(getkey(), (7, 11)), "b": jax.random.normal(getkey(), (13,))}
    saved = _written(tree)
    for name, array in tree.items():
        np.testing.assert_array_equal(saved[name], array)
        assert saved[name].unsafe_buffer_pointer() != array.unsafe_buffer_pointer()


# Profiles


def test_a_profile_is_a_trace_of_the_steps_that_were_asked_for(config, data, capsys):
    config = dataclasses.replace(config, profile="3:5", eval_interval=4)
    run_training(config, data)
    path = Path(config.out_dir) / "profile" / "steps-3-4.json.gz"
    assert f"steps 3 to 4 are traced in {path}" in capsys.readouterr().err
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    whole = [event for event in events if event.get("ph") == "X"]
    steps = [event["args"]["step_num"] for event in whole if event["name"] == "train"]
    assert steps == ["3", "4"]
    assert {"data", "evaluation", "checkpoint"} <= {event["name"] for event in whole}
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in whole)


def test_a_profile_that_is_interrupted_is_kept(config, data, monkeypatch):
    config = dataclasses.replace(config, profile="1:5", eval_interval=6)
    monkeypatch.setattr(train.loop, "Interruption", lambda *_: StopAfter(3))
    assert run_training(config, data).steps_done == 3
    assert (Path(config.out_dir) / "profile" / "steps-1-2.json.gz").exists()


@pytest.mark.parametrize("value", ["10", "True", "5:5", "7:3", "-1:3", "a:b", ":", "1:2:3"])
def test_a_profile_is_a_range_of_steps(value):
    with pytest.raises(ValueError, match=r"profile must be FIRST:STOP, such as 10:13"):
        TrainConfig(profile=value)


def test_a_profile_of_steps_that_never_come_is_refused(config, data):
    config = dataclasses.replace(config, profile="5:7")
    with pytest.raises(ValueError, match="profile='5:7' goes beyond max_iters=6"):
        run_training(config, data)
