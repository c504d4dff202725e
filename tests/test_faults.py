"""What a run survives: damaged files, full disks, kills, failures of what is beside training."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_run import FLAGS, ROOT, command, losses, make_dataset, run, start

import train.loop
from eqx_gpt.checksum import checksums
from eqx_gpt.tree import named_arrays
from eqx_gpt.unreadable import Unreadable, read
from train.checkpoint import Checkpoints
from train.compare import differences
from train.config import TrainConfig, model_config
from train.interrupt import Interrupted
from train.lock import locked
from train.loop import train as run_training
from train.manifest import Manifest
from train.metrics import MetricsFile
from train.run import RunError
from train.start import skeleton
from weights import WeightsError, from_pretrained

# Writes that Orbax leaves behind fail whenever they like. What reads leave is nobody's to hear.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
silent = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    make_dataset(place / "data")
    return place


@pytest.fixture(scope="module")
def data(place):
    return Manifest.read(place / "data" / "tiny")


@pytest.fixture(scope="module")
def config(place):
    flags = {**FLAGS, "max_iters": 12, "lr_decay_iters": 12, "eval_interval": 4,
             "checkpoint_interval": 4, "precision": "float32"}  # fmt: skip
    return TrainConfig(**flags, data_dir=str(place / "data"), keep_checkpoints=3)


@pytest.fixture(scope="module")
def straight(config, data, place):
    run_training(dataclasses.replace(config, out_dir=str(place / "straight")), data)
    return place / "straight"


@pytest.fixture
def copied(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / "run")


def at(config, directory):
    return dataclasses.replace(config, out_dir=str(directory))


# Checkpoints


def largest(directory, pattern="d/*"):
    return max(directory.rglob(pattern), key=lambda path: path.stat().st_size)


def truncate(step):
    os.truncate(largest(step / "model"), 100)


def remove(step):
    largest(step / "optimizer").unlink()


def no_progress(step):
    (step / "progress/metadata").unlink()


def garble(step):
    """One bit of the index, which cannot be decoded any more."""
    (path,) = (step / "model/d").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


UNDECODED = r'Error reading "[a-z0-9_.]+/.zarray": Error decoding b-tree node: CRC-32C checksum .*'


def flip(step):
    """One bit of one number, in files that are whole: the format itself does not notice."""
    item = step / "model"
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = {name: np.array(x) for name, x in checkpointer.restore(item).items()}
        arrays["wte.weight"].view(np.uint32)[3, 5] ^= 4
        shutil.rmtree(item)
        checkpointer.save(item, arrays)


def other_number(step):
    path = step / "progress/metadata"
    path.write_text(path.read_text().replace('"skipped": 0', '"skipped": 1'))


@silent
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, r'Error reading "[a-z0-9_.]+/[0-9.]+": Requested byte range .* of size 100'),
        (remove, r'Error reading "\S+/[0-9.]+": Not enough data: .*'),
        (no_progress, r".*progress.*"),
        (garble, UNDECODED),
        (flip, r"model: wte.weight changed since they were saved"),
        (other_number, r"progress changed since it was saved"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage, why, copied, straight, config, data, capfd
):
    damage(copied / "checkpoints/12")
    outcome = run_training(at(config, copied), data, resume=True)
    assert (outcome.steps_done, outcome.saved) == (12, True)
    said = capfd.readouterr().err
    before = "CHECKPOINT 12 IS DAMAGED, now 12.damaged, going on from 8: "
    (line,) = [line for line in said.splitlines() if line.startswith(before)]
    assert re.fullmatch(why, line.removeprefix(before))
    assert "Traceback" not in said
    assert (copied / "checkpoints/12.damaged/model").is_dir()
    assert differences(copied, straight) == []


def test_if_all_are_damaged_the_run_ends_and_nothing_changes(copied, config, data):
    for step in (copied / "checkpoints").iterdir():
        truncate(step)
    names = sorted(path.name for path in (copied / "checkpoints").iterdir())
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged \(12: .*; 8: .*; 4: "):
        run_training(at(config, copied), data, resume=True)
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == names
    with pytest.raises(WeightsError, match=r"12/model: .* is damaged .*checkpoints/8/model"):
        from_pretrained(copied)


@silent
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flip, "wte.weight changed since they were saved"),
        (garble, UNDECODED),
    ],
)
def test_sampling_passes_over_a_damaged_checkpoint(damage, why, copied, capfd):
    damage(copied / "checkpoints/12")
    expected = rf"/12/model: the checkpoint is damaged \({why}\); taking \S*/checkpoints/8$"
    with pytest.warns(UserWarning, match=expected):
        model = from_pretrained(copied)
    assert "Traceback" not in capfd.readouterr().err
    at_eight = shutil.copytree(copied, copied.parent / "eight")
    shutil.rmtree(at_eight / "checkpoints/12")
    assert eqx.tree_equal(model, from_pretrained(at_eight))
    assert from_pretrained(at_eight, dtype="bfloat16").wte.weight.dtype == jnp.bfloat16


def test_what_is_no_damage_is_told_from_it():
    """A checkpoint that this process may not read, or has no memory for, is not set aside."""

    def failing(error):
        def action():
            try:
                raise error
            except Exception as inner:
                raise Exception("See full TensorStore details") from inner

        return action

    for error in (
        MemoryError("no room"),
        PermissionError(13, "Permission denied"),
        ValueError('PERMISSION_DENIED: Error reading "a/0" in OCDBT database at local file "/b/"'),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"),
    ):
        with pytest.raises(OSError, match=r"no room|denied|^Error reading .a/0.$|Out of memory"):
            read(failing(error))
    with pytest.raises(Unreadable, match=r"^KeyError: 'a'$"):
        read(failing(KeyError("a")))
    assert read(lambda: 7) == 7


@silent
def test_what_a_failed_read_leaves_is_not_heard():
    """A task that never began, noticed when it is collected; one that is still read for."""

    async def nothing():
        pass

    def action():
        left = nothing()
        raise ValueError(f"of {left}")

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(Unreadable, match=r"^of <coroutine"):
            read(action)
    assert heard == []

    def reading():
        """What is read for a task holds it, and wakes its event loop at the end."""
        loop = asyncio.new_event_loop()
        left = loop.create_future()
        loop.close()

        def end():
            with pytest.raises(RuntimeError, match="Event loop is closed"):
                left.get_loop().call_soon_threadsafe(print)
            ended.append(True)

        threading.Timer(0.3, end).start()
        raise ValueError("damaged")

    ended = []
    with pytest.raises(Unreadable, match=r"^damaged$"):
        read(reading)
    assert ended == [True]


def test_a_checkpoint_from_before_there_were_checksums_is_read(copied, straight, config, data):
    for step in (copied / "checkpoints").iterdir():
        shutil.rmtree(step / "checksums")
        path = step / "progress/metadata"
        progress = json.loads(path.read_text())
        del progress["guard"], progress["crc32"]
        path.write_text(json.dumps(progress))
    longer = dataclasses.replace(at(config, copied), max_iters=13)
    assert run_training(longer, data, resume=True).steps_done == 13


def test_the_second_save_of_a_step_never_removes_the_first(copied, config, data):
    """Its arrays are the same: only what is known of it changes, in one file, atomically."""

    def times():
        return {path: path.stat().st_mtime_ns for path in copied.rglob("checkpoints/12/*/d/*")}

    before = times()
    checkpoints = Checkpoints(copied)
    shapes = skeleton(config, model_config(config, data.vocab_size), jnp.float32)
    state, _ = checkpoints.restore(shapes)
    checkpoints.save(state, 12, {"evaluated_at": None, "elapsed_s": 1.0})
    checkpoints.close()
    assert {
        path: path.stat().st_mtime_ns for path in copied.rglob("checkpoints/12/*/d/*")
    } == before
    assert json.loads((copied / "checkpoints/12/progress/metadata").read_text())["elapsed_s"] == 1


def test_checksums_tell_every_changed_bit_and_no_sharding():
    draw = np.random.default_rng(0)
    arrays = {
        "f32": draw.standard_normal((7, 5, 3)).astype(np.float32),
        "bf16": jnp.asarray(draw.standard_normal((11, 3)), jnp.bfloat16),
        "i32": draw.integers(-9, 9, (13,)).astype(np.int32),
        "bool": np.array([True, False]),
        "scalar": np.float32(3),
    }
    found = checksums({name: jnp.asarray(x) for name, x in arrays.items()})
    bits = np.asarray(arrays["f32"]).reshape(-1).view(np.uint32).astype(np.uint64)
    odd = 2 * np.arange(bits.size, dtype=np.uint64) + 1
    assert found["f32"] == int((bits * odd).sum() % 2**32)
    for name, x in arrays.items():
        for _ in range(5):
            content = bytearray(np.asarray(x).tobytes())
            at = draw.integers(len(content))
            content[at] ^= 1 if name == "bool" else 1 << int(draw.integers(8))
            changed = np.frombuffer(bytes(content), np.asarray(x).dtype).reshape(np.shape(x))
            assert checksums({name: jnp.asarray(changed)})[name] != found[name], name


# Disks


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    """As on a full disk: what is longer cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def compile_a_save(*trees):
    """Before the disk is full: programs are kept there too, and would be cut."""
    for tree in trees:
        checksums({name: jnp.copy(x) for name, x in named_arrays(tree).items()})


def test_a_full_disk_is_said_and_the_next_save_tries_again(
    straight, config, data, tmp_path, monkeypatch, capfd
):
    """Full at step 4, free again before step 8."""
    whole = Checkpoints.save

    def save(self, state, step, progress):
        if step != 4:
            return whole(self, state, step, progress)
        compile_a_save(state.params, state.opt_state)
        with files_of_at_most(50):
            whole(self, state, step, progress)
            until = time.monotonic() + 60
            while not self._states._writing.done():
                assert time.monotonic() < until
                time.sleep(0.01)

    monkeypatch.setattr(Checkpoints, "save", save)
    outcome = run_training(at(config, tmp_path), data)
    assert (outcome.steps_done, outcome.saved) == (12, True)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert f"CHECKPOINT IN {tmp_path} NOT WRITTEN, none is on disk: " in said
    assert said.count("NOT WRITTEN") == 1
    assert said.index("NOT WRITTEN") < said.index("iter 7/12")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "8"]
    assert differences(tmp_path, straight) == []


def test_a_best_model_that_could_not_be_written_is_not_the_best(
    config, data, tmp_path, monkeypatch, capfd
):
    """The first evaluation's, which is better than all that follow; the disk is full for it."""
    whole, n_evaluation = Checkpoints.save_best, itertools.count(1)
    monkeypatch.setattr(train.loop, "sampled_loss", lambda *_, **__: float(next(n_evaluation)))

    def save_best(self, params, step):
        if step != 4:
            return whole(self, params, step)
        compile_a_save(params)
        with files_of_at_most(50):
            whole(self, params, step)
            until = time.monotonic() + 60
            while not self._best._writing.done():
                assert time.monotonic() < until
                time.sleep(0.01)

    monkeypatch.setattr(Checkpoints, "save_best", save_best)
    changed = dataclasses.replace(config, eval_interval=4, always_save_checkpoint=False)
    run_training(at(changed, tmp_path), data)
    assert capfd.readouterr().err.count("NOT WRITTEN") == 1
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["8"]


def test_a_run_that_could_not_save_its_last_step_says_so(
    config, data, tmp_path, monkeypatch, capsys
):
    whole = Checkpoints.save

    def save(self, state, step, progress):
        if step == 12:
            raise OSError(28, "No space left on device")
        return whole(self, state, step, progress)

    monkeypatch.setattr(Checkpoints, "save", save)
    outcome = run_training(at(config, tmp_path), data)
    assert (outcome.saved, outcome.exit_code) == (False, 1)
    said = capsys.readouterr().err
    assert "NOT WRITTEN, the last on disk is step 8: OSError: [Errno 28]" in said
    assert "step 12 is saved" not in said


def test_a_directory_that_vanished_is_made_anew(
    straight, config, data, tmp_path, monkeypatch, capsys
):
    directory, whole = tmp_path / "run", train.loop.train_step

    def step(inputs, state):
        if int(state.step) == 6:
            directory.rename(tmp_path / "elsewhere")
        return whole(inputs, state)

    monkeypatch.setattr(train.loop, "train_step", step)
    assert run_training(at(config, directory), data).saved
    assert f"{directory} IS GONE, and is made anew" in capsys.readouterr().err
    assert losses(directory) == losses(straight)
    assert differences(directory, straight) == []


def test_metrics_that_could_not_be_written_are_written_later(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, None)
    file.write({"iter": 0, "train_loss": 1.0})
    with files_of_at_most(40), pytest.raises(OSError, match=r"too large|space"):
        file.write({"iter": 1, "train_loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    file.write({"iter": 2, "train_loss": 3.0})
    file.close()
    assert losses(tmp_path) == {("train_loss", i): i + 1.0 for i in range(3)}


# What is beside training


def test_failures_beside_training_lose_nothing(
    straight, config, data, tmp_path, monkeypatch, capsys
):
    calls = []

    def no_memory(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return whole(*args, **kwargs)

    def broken(*args):
        raise OSError("no such device")

    whole = train.loop.sampled_loss
    monkeypatch.setattr(train.loop, "sampled_loss", no_memory)
    monkeypatch.setattr(train.loop, "plot_losses", broken)
    monkeypatch.setattr(train.loop, "extra_loggers", lambda *_, **__: [broken])
    assert run_training(at(config, tmp_path), data).exit_code == 0
    said = capsys.readouterr().err
    assert "EVALUATION FAILED, the run goes on: RuntimeError: RESOURCE_EXHAUSTED" in said
    assert said.count("LOGGER 1 FAILED, the run goes on; this is said once: OSError: no") == 1
    assert said.count("LOSS.PNG FAILED") == 1
    found = losses(tmp_path)
    assert ("val_loss", 4) not in found
    assert found.items() <= losses(straight).items()


def test_interruptions_pass_through_what_is_passed_over(config, data, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(train.loop, "sampled_loss", interrupted)
    outcome = run_training(at(config, tmp_path), data)
    assert (outcome.steps_done, outcome.exit_code) == (4, 143)


# Processes


def test_a_second_process_is_refused_until_the_first_is_gone(place):
    flags = {**FLAGS, "max_iters": 100_000, "lr_decay_iters": 100_000, "eval_interval": 100_000}
    with start(command("train.py", **flags, out_dir="locked"), place) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("iter 7/"):
                break
        second = run(command("train.py", init_from="resume", out_dir="locked"), place)
        look = run(command("train.py", init_from="resume", out_dir="locked", eval_only=True), place)
        still_running = process.poll() is None
        process.kill()
    assert still_running
    assert second.returncode == 2, second.stderr
    host = os.uname().nodename
    assert f"another process trains in 'locked': process {process.pid} on {host}" in second.stderr
    assert look.returncode == 0, look.stderr
    with locked(place / "locked"):
        pass


def test_preemption_ends_a_run_that_would_not_save_in_time():
    """A process that looks for no signal, as while it waits for a device."""
    program = (
        "import time\n"
        "from train.interrupt import Interruption\n"
        "with Interruption(lambda: None, 0.5):\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(1)\n"
    )
    with start([sys.executable, "-c", program], ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        assert "ended at once, for preemption_s=0.5 is over: the last checkpoint" in err
        assert time.monotonic() - sent < 30


def test_a_run_killed_again_and_again_is_the_run_that_was_not(place):
    """As 200 times by the same command, with a kill of each kind."""
    result = run(command("benchmarks/kills.py", kills=4), place)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["kills"], found["exact"]) == (4, True)
    assert min(found["checkpoint"], found["evaluation"]) > 0


@pytest.mark.parametrize(("n_device", "mesh"), [(1, "auto"), (2, "auto"), (2, "fsdp=2")])
def test_a_command_verifies_that_a_run_resumes_exactly(n_device, mesh, place, monkeypatch):
    """Also on a CPU as two devices, with samples and micro-batches on the way."""
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={n_device}")
    more = {"batch_size": 4, "gradient_accumulation_steps": 3, "sample_interval": 4}
    flags = {**FLAGS, **more, "decay_lr": False, "out_dir": "unused", "mesh": mesh}
    result = run(command("verify_resume.py", 9, "--interruptions=2", **flags), place)
    assert result.returncode == 0, result.stderr
    assert (
        "A run of 9 steps, 2 times interrupted, is, bit for bit, the run that was" in result.stdout
    )
    assert result.stderr.count("SIGKILL at") == result.stderr.count("SIGTERM at") == 1
    assert not (place / "unused").exists()


def test_runs_that_differ_are_told_apart(straight, copied):
    assert differences(straight, copied) == []
    path = copied / "metrics.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[5])
    record["train_loss"] = float(np.nextafter(record["train_loss"], 9))
    path.write_text("\n".join([*lines[:5], json.dumps(record), *lines[6:]]) + "\n")
    assert len(differences(straight, copied)) == 1
    shutil.rmtree(copied / "checkpoints/12")
    found = differences(straight, copied)
    assert "the last checkpoint is of step 12 and of step 8" in found
    assert any("wte.weight differs" in line or "more" in line for line in found)
