"""From the start of a process to its first step, and to the end of its run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import rich.box
import rich.table

from scripts.benchmarks.peers import check_installed
from train.manifest import Manifest
from train.presets import get_preset

SCRIPTS = Path(__file__).resolve().parent.parent
Environment = dict[str, str]


def measure(
    preset: str,
    data_dir: Path,
    *,
    n_round: int,
    whole: bool,
    against_torch: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Seconds, by what was started: medians and all rounds.

    The first step is over when its loss is shown. A whole run is `scripts/train.py` and then
    `scripts/eval.py` over the whole validation split, two processes; torch's is one.
    """
    if against_torch:
        check_installed("torch")
    config = get_preset(preset)
    Manifest.read(data_dir / config.dataset)  # or an error that says how to prepare it
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        runs = _Runs(preset, data_dir, config.dataset, scratch)
        kinds: dict[str, Callable[[], float]] = {
            "first step, nothing compiled before": runs.cold_first_step,
            "first step, compiled before": runs.first_step,
        }
        if against_torch:
            kinds["first step, torch"] = runs.torch_first_step
        if whole:
            kinds["whole run, compiled before"] = runs.whole
            if against_torch:
                kinds["whole run, torch"] = runs.torch_whole
        runs.cold_first_step()  # files into the system's memory
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i in range(n_round):
            for kind, run in kinds.items():
                say(f"{kind}, round {i + 1} of {n_round}")
                seconds[kind].append(run())
    medians = {kind: median(values) for kind, values in seconds.items()}
    found: dict[str, Any] = {"preset": preset, "seconds": medians, "rounds": seconds}
    if whole and against_torch:
        ours, theirs = medians["whole run, compiled before"], medians["whole run, torch"]
        found["whole_run_share_of_torch"] = ours / theirs
    return found


def table(found: dict[str, Any]) -> rich.table.Table:
    result = rich.table.Table(
        title=f"{found['preset']}, from the start of the process", title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )  # fmt: skip
    result.add_column("until")
    for name in ("median", "least", "most"):
        result.add_column(name, justify="right")
    for kind, seconds in found["seconds"].items():
        rounds = found["rounds"][kind]
        result.add_row(kind, *(f"{s:.2f} s" for s in (seconds, min(rounds), max(rounds))))
    return result


class _Runs:
    """The commands, each with an output folder and a cache of compiled programs of its own."""

    def __init__(self, preset: str, data_dir: Path, dataset: str, scratch: Path) -> None:
        self.scratch, self.n_started = scratch, 0
        self.cache = scratch / "cache"
        flags = ["--preset", preset, "--data_dir", str(data_dir)]
        self.train = [sys.executable, str(SCRIPTS / "train.py"), *flags]
        self.evaluate = [sys.executable, str(SCRIPTS / "eval.py"), "--data_dir", str(data_dir)]
        run = SCRIPTS / "benchmarks" / "torch_run.py"
        config = scratch / "config.json"
        self.torch = [sys.executable, str(run), str(config), str(data_dir / dataset)]

    def cold_first_step(self) -> float:
        self.cache = self.scratch / f"cache{self.n_started}"
        return self.first_step()

    def first_step(self) -> float:
        return _until_first_step([*self.train, "--out_dir", self._folder()], self._environment())

    def whole(self) -> float:
        folder = self._folder()
        return sum(
            _until_end([*command, "--out_dir", folder], self._environment())
            for command in (self.train, self.evaluate)
        )

    def torch_first_step(self) -> float:
        return _until_first_step([*self.torch, self._folder()], dict(os.environ))

    def torch_whole(self) -> float:
        return _until_end([*self.torch, self._folder()], dict(os.environ))

    def _folder(self) -> str:
        self.n_started += 1
        folder = self.scratch / f"run{self.n_started}"
        folder.mkdir()
        return str(folder)

    def _environment(self) -> Environment:
        """As a user's, but for the folder that compiled programs are kept in."""
        ours = {**os.environ, "XDG_CACHE_HOME": str(self.cache)}
        ours.pop("JAX_COMPILATION_CACHE_DIR", None)
        return ours


@contextmanager
def _started(argv: list[str], environment: Environment) -> Iterator[subprocess.Popen[str]]:
    """A process whose words come as one stream; it ends with the context."""
    process = subprocess.Popen(
        argv, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        process.wait()


def _until_first_step(argv: list[str], environment: Environment) -> float:
    start = time.perf_counter()
    said = []
    with _started(argv, environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("iter 0/"):
                return time.perf_counter() - start
            said.append(line)
    raise ValueError(f"{Path(argv[1]).name} ended before its first step: {''.join(said[-5:])}")


def _until_end(argv: list[str], environment: Environment) -> float:
    start = time.perf_counter()
    with _started(argv, environment) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        code = process.wait()
    if code != 0:
        raise ValueError(f"{Path(argv[1]).name} failed with exit code {code}: {said[-500:]}")
    return time.perf_counter() - start
