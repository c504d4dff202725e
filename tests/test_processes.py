"""Runs of several processes over loopback: the losses of one, signals, a death, and going on."""

import dataclasses
import os
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import pytest
from tiny_run import command, losses, make_dataset, run, start

from train.cluster import Hosts, found_cluster
from train.hosts import DIED, met_by_all
from train.run import RunError

FLAGS = {
    "dataset": "tiny", "n_layer": 1, "n_head": 2, "n_embd": 14, "block_size": 13, "batch_size": 12,
    "gradient_accumulation_steps": 1, "lr_decay_iters": 30, "warmup_iters": 3, "min_lr": 0.001,
    "learning_rate": 0.01, "dropout": 0.0, "eval_interval": 7, "eval_iters": 2,
    "checkpoint_interval": 3, "precision": "float32", "max_iters": 10**6,
}  # fmt: skip
END_S = 60.0  # in which the others of a dead process have to end


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    make_dataset(place / "data")
    return place


def started(place: Path, n: int, out_dir: str, **flags: object) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            command(
                "train.py", **{**FLAGS, **flags}, out_dir=out_dir, num_processes=n, process_id=i,
                coordinator_address=f"127.0.0.1:{port}",
            ),
            place,
        )
        for i in range(n)
    ]  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(f"iter {step}/"):
            return
    raise AssertionError("".join(seen))


def steps_saved(place: Path, out_dir: str) -> list[int]:
    found = (place / out_dir).glob("checkpoints/*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def wait_for_checkpoints(place: Path, out_dir: str, n: int) -> None:
    for _ in range(2400):
        if len(steps_saved(place, out_dir)) >= n:
            return
        time.sleep(0.1)
    raise AssertionError(f"there are no {n} checkpoints")


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    with_text = [(p, p.communicate(timeout=240)[1]) for p in processes]
    return [(p.returncode, text) for p, text in with_text]


def resume(place: Path, n: int, out_dir: str, max_iters: int, **more: object) -> str:
    """To the end, on one process or several; returns what the first of them says."""
    flags = {"init_from": "resume", "max_iters": max_iters, **more}
    if n == 1:
        done = run(command("train.py", out_dir=out_dir, **flags), place)
        assert done.returncode == 0, done.stderr
        return done.stderr
    results = ended(started(place, n, out_dir, **flags))
    for code, err in results:
        assert code == 0, err
    return results[0][1]


def check_against_one_process(place: Path, out_dir: str, max_iters: int) -> None:
    alone = f"{out_dir}-alone"
    done = run(command("train.py", **{**FLAGS, "out_dir": alone, "max_iters": max_iters}), place)
    assert done.returncode == 0, done.stderr
    expected, found = losses(place / alone), losses(place / out_dir)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)


def test_two_processes_stop_together_and_one_goes_on(place: Path) -> None:
    """The signal comes to one of them, and not to the one that writes."""
    processes = started(place, 2, "two")
    wait_for_step(processes[0], 5)
    processes[1].send_signal(signal.SIGTERM)
    (code, err), (other_code, other_err) = ended(processes)
    assert (code, other_code) == (143, 143), err + other_err
    assert "stopped by SIGTERM" in err
    assert "iter " not in other_err  # one of them speaks
    stopped = steps_saved(place, "two")[-1]
    resume(place, 1, "two", stopped + 5)
    check_against_one_process(place, "two", stopped + 5)


@pytest.mark.parametrize(("n", "victim"), [(2, 0), (4, 3)])
def test_when_a_process_dies_the_others_end_and_fewer_go_on(
    n: int, victim: int, place: Path
) -> None:
    out_dir = f"died-{n}"
    processes = started(place, n, out_dir)
    wait_for_checkpoints(place, out_dir, 1)
    processes[victim].kill()
    began = time.monotonic()
    results = ended(processes)
    assert time.monotonic() - began < END_S
    for i, (code, err) in enumerate(results):
        if i != victim:
            assert code not in (0, 2, -signal.SIGKILL)
            assert "has died" in err or "fatal error" in err.lower(), err
    saved = steps_saved(place, out_dir)[-1]
    resume(place, n - 1, out_dir, saved + 4)
    check_against_one_process(place, out_dir, saved + 4)


def test_what_one_process_cannot_write_or_read_is_lost_to_both(place: Path) -> None:
    """A save that fails in one of them ends both; a checkpoint that is damaged to one of them is
    passed over by both."""
    processes = started(place, 2, "half", mesh="fsdp=2")
    wait_for_checkpoints(place, "half", 2)
    # As on a full disk: what is longer cannot be written.
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (50, 50))
    began = time.monotonic()
    (code, err), (other_code, other_err) = ended(processes)
    assert time.monotonic() - began < END_S
    assert other_code == DIED, other_err
    before, newest = steps_saved(place, "half")
    said = f"process 1 of 2 ends: CHECKPOINT IN half NOT WRITTEN, the last on disk is step {newest}"
    assert said in other_err
    assert code not in (0, 2, -signal.SIGKILL)
    assert "has died" in err or "fatal error" in err.lower(), err

    parts = (place / f"half/checkpoints/{newest}/model/ocdbt.process_1/d").iterdir()
    os.truncate(max(parts, key=lambda path: path.stat().st_size), 100)
    err = resume(place, 2, "half", newest + 4, mesh="fsdp=2")
    aside = f"CHECKPOINT {newest} IS DAMAGED, now {newest}.damaged, going on from {before}"
    assert f'{aside}: process 1: Error reading "' in err
    assert "Traceback" not in err
    check_against_one_process(place, "half", newest + 4)


def test_a_program_that_fails_in_one_process_is_no_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer"
    for error in (ValueError(lost), ValueError("RESOURCE_EXHAUSTED: 1"), OSError("no space")):
        assert met_by_all(error)  # there is but one process
        with monkeypatch.context() as two:
            two.setattr(jax, "process_count", lambda: 2)
            assert not met_by_all(error)
            assert met_by_all(ValueError("n_layer is 0; give at least 1"))
            assert met_by_all(RunError("UNKNOWN: a directory of that name holds no run"))


def test_flags_of_processes_go_together() -> None:
    with pytest.raises(ValueError, match="go together, got 'a:1', None, None"):
        Hosts("a:1")
    with pytest.raises(ValueError, match="has no port; give HOST:PORT"):
        Hosts("a", 2, 0)
    with pytest.raises(ValueError, match="process_id=2 is none of num_processes=2"):
        Hosts("a:1", 2, 2)
    assert dataclasses.asdict(Hosts()) == {
        "coordinator_address": None, "num_processes": None, "process_id": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),  # an interactive job
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook in a pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "Kubernetes"),
    ],
)
def test_what_starts_processes_is_found(
    environment: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR", "JOB_COMPL")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert found_cluster() == found
