"""Measures speed: python scripts/bench.py train --preset gpt2-small --batch_size 2 --against torch.

Every contender works in a process of its own; peers are timed in turn with ours. A table goes to
stderr, and the same as one line of JSON to stdout.
"""

import dataclasses
import json
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

# `scripts/` comes first otherwise, and `scripts/train.py` would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import rich.console  # noqa: E402
import tyro  # noqa: E402

from scripts.benchmarks import checkpoints, growth, startup  # noqa: E402
from scripts.benchmarks.job import Contender, Job, Task  # noqa: E402
from scripts.benchmarks.models import Subject, subject_of, written  # noqa: E402
from scripts.benchmarks.peers import Environment, Peer, Variant, peers_of  # noqa: E402
from scripts.benchmarks.table import about_machine, records, table  # noqa: E402
from scripts.benchmarks.timing import ceilings, compare  # noqa: E402
from scripts.common import parse, run_command  # noqa: E402
from train.manifest import Manifest  # noqa: E402

OURS = "scripts.benchmarks.ours"
MACHINE = Contender("machine", "scripts.benchmarks.machine", {}, tuned=True)
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True)
class Rounds:
    """How timing is done, and against whom."""

    rounds: int = 5
    """Timings of each contender; medians are reported."""
    round_seconds: float = 2.0
    """About how long one takes; the work is repeated to fill it."""
    against: tuple[Peer, ...] = ()
    """Peers to time in turn with ours, in the same run."""
    variants: tuple[Variant, ...] = ("float32", "bfloat16", "compile")
    """Configurations of torch and transformers: float32 as nanoGPT ships for CPUs; bfloat16
    (autocast when training); that and torch.compile (training alone)."""
    peer_environment: Environment = "plain"
    """Memory allocator of the peers: plain is as their users run them, tuned is with the settings
    that our commands give themselves."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if not 0 < self.round_seconds < float("inf"):
            raise ValueError(f"round_seconds must be above 0, got {self.round_seconds}")


@dataclass(frozen=True)
class Model:
    """What model, and whether the plain formulas are timed beside our kernels."""

    model: Name = None
    """A model of the zoo (gpt2, smollm2-135m), a local Hugging Face directory or .gguf file."""
    preset: Name = None
    """Or the model of a training preset (gpt2-small, shakespeare-char), with its batch."""
    weights: Literal["auto", "random"] = "auto"
    """auto: the model's own weights where they are on this machine, else random ones."""
    ops: Literal["kernels", "reference"] = "kernels"
    """reference: also time what XLA makes of the same model in plain formulas, in turn."""


@dataclass(frozen=True)
class Train:
    """Optimizer steps: forward, backward, clipping, AdamW. Without dropout, on random tokens."""

    model: tyro.conf.OmitArgPrefixes[Model] = field(default_factory=Model)
    timing: tyro.conf.OmitArgPrefixes[Rounds] = field(default_factory=Rounds)
    batch_size: int | None = None
    """Sequences in a step. None: the preset's, otherwise 2."""
    block_size: int | None = None
    """Tokens in a sequence. None: the preset's, otherwise 1024 or the model's own, if less."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What our model computes in; as --precision of scripts/train.py."""


@dataclass(frozen=True)
class Prefill:
    """From a prompt to its first new token."""

    model: tyro.conf.OmitArgPrefixes[Model] = field(default_factory=Model)
    timing: tyro.conf.OmitArgPrefixes[Rounds] = field(default_factory=Rounds)
    batch_size: int = 1
    """Prompts at once."""
    prompt: int = 512
    """Tokens in a prompt."""
    quantize: Literal["int8"] | None = None
    """int8: our weights in 8 bits. None: in bfloat16."""


@dataclass(frozen=True)
class Decode:
    """New tokens after the first, without the prefill."""

    model: tyro.conf.OmitArgPrefixes[Model] = field(default_factory=Model)
    timing: tyro.conf.OmitArgPrefixes[Rounds] = field(default_factory=Rounds)
    batch_size: int = 1
    """Sequences at once."""
    prompt: int = 16
    """Tokens in the prompt."""
    new_tokens: int = 128
    """Tokens decoded for each sequence, all with the same sampler on both sides."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int | None = 50
    """Draw from the k likeliest tokens alone. None: from all."""
    quantize: Literal["int8"] | None = None
    """int8: our weights in 8 bits. None: in bfloat16."""


@dataclass(frozen=True)
class Load:
    """From files that the system has read before to a model in float32."""

    model: tyro.conf.OmitArgPrefixes[Model] = field(default_factory=Model)
    timing: tyro.conf.OmitArgPrefixes[Rounds] = field(default_factory=Rounds)


@dataclass(frozen=True)
class Startup:
    """scripts/train.py from the start of its process, on prepared data."""

    preset: str = "shakespeare-char-cpu"
    """The run."""
    data_dir: str = "data"
    """Where its dataset was prepared."""
    rounds: int = 3
    """Starts of each kind; medians are reported."""
    whole: bool = True
    """Also run it to its end, with one evaluation of the whole validation split."""
    against: tuple[Literal["torch"], ...] = ()
    """torch: the same job as nanoGPT does it, in turn."""


@dataclass(frozen=True)
class Growth:
    """Tokens a second and memory of training as sequences and models grow."""

    out: Path = Path("out/growth")
    """Folder for growth.json, growth.md and, where matplotlib is installed, growth.png."""
    block_sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Lengths of the sequences, for the preset's model at --batch_size."""
    preset: str = "gpt2-small"
    """The model that reads them."""
    sizes: tuple[str, ...] = tuple(growth.SIZES)
    """Models of growing size, at 1024 tokens."""
    batch_size: int = 1
    """Sequences in a step."""
    timing: tyro.conf.OmitArgPrefixes[Rounds] = field(default_factory=lambda: Rounds(rounds=3))
    ops: Literal["kernels", "reference"] = "kernels"
    """reference: also what XLA makes of the plain formulas, in turn."""


@dataclass(frozen=True)
class Checkpoints:
    """What checkpoints cost scripts/train.py, and what it waits for data."""

    preset: str = "gpt2-small"
    """The run, without its accumulation and dropout."""
    batch_size: int = 2
    """Sequences in a step."""
    interval: int = 50
    """Steps between checkpoints that the cost is told for."""
    window: int = 12
    """Steps between those of the measurement: twice those that a checkpoint slows, or more."""
    saves: int = 4
    """Checkpoints that are measured; medians are reported."""
    dataset: str = "stdlib"
    """Prepared by scripts/prepare.py."""
    data_dir: str = "data"
    """Where it was prepared."""


Timed = Train | Prefill | Decode | Load
Command = Timed | Startup | Growth | Checkpoints


def main() -> int:
    command = cast(Command, parse(cast(Any, Command)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end the workers
    if isinstance(command, Startup):
        found = measure_startup(command)
    elif isinstance(command, Growth):
        found = measure_growth(command)
    elif isinstance(command, Checkpoints):
        found = measure_checkpoints(command)
    else:
        found = measure(command)
    name = type(command).__name__.lower()
    print(json.dumps({"command": name, **about_machine(), **found}))
    return 0


def measure(command: Timed) -> dict[str, Any]:
    """Ours, and its peers in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        subject, job, settings = planned(command, Path(scratch))
        peaks, rows = timed(job, settings, command.model.ops, command.timing)
    work = f"{job.batch_size} x {job.seq} tokens"
    if job.new_tokens:
        work += f" and {job.new_tokens} new ones"
    what = f"{job.task} {subject.name}" + ("" if job.task == "load" else f", {work}")
    show(table(f"{what}; {described(peaks)}", rows))
    return {
        "model": subject.name,
        "weights": job.source or "random",
        "batch_size": job.batch_size,
        "seq": job.seq,
        "new_tokens": job.new_tokens,
        "ceilings": peaks,
        "ours": rows[0],
        "peers": rows[1:],
    }


def planned(command: Timed, scratch: Path) -> tuple[Subject, Job, dict[str, Any]]:
    """What is timed, the job, and the settings of ours.

    A model without files is written into `scratch` to be loaded.
    """
    choice = command.model
    subject = subject_of(choice.model, choice.preset, random=choice.weights == "random")
    task = cast(Task, type(command).__name__.lower())
    config = subject.config
    job = Job(task, config.to_dict(), subject.hf, subject.source)
    job = dataclasses.replace(job, round_seconds=command.timing.round_seconds)
    settings: dict[str, Any] = {}
    if isinstance(command, Train):
        settings["precision"] = command.precision
        batch_size = subject.batch_size if command.batch_size is None else command.batch_size
        seq = subject.block_size if command.block_size is None else command.block_size
        job = dataclasses.replace(job, source=None, batch_size=batch_size, seq=seq)
    elif isinstance(command, Load):
        job = dataclasses.replace(job, source=job.source or written(config, scratch))
    else:
        settings["quantize"] = command.quantize
        job = dataclasses.replace(job, batch_size=command.batch_size, seq=command.prompt)
    if isinstance(command, Decode):
        sampler = {"temperature": command.temperature, "top_k": command.top_k}
        job = dataclasses.replace(job, new_tokens=command.new_tokens, **sampler)
    check_sizes(job, config.block_size)
    return subject, job, settings


def check_sizes(job: Job, block_size: int) -> None:
    for name in ("batch_size", "seq"):
        if getattr(job, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(job, name)}")
    if job.task == "decode" and job.new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {job.new_tokens}")
    longest = job.seq + job.new_tokens
    if longest > block_size:
        raise ValueError(
            f"{longest} tokens are more than the {block_size} that the model takes; ask for fewer"
        )


def timed(
    job: Job,
    settings: dict[str, Any],
    ops: str,
    timing: Rounds,
    peaks: dict[str, float] | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The machine's ceilings, and one record a contender: ours first."""
    quantized = f" {settings['quantize']}" if settings.get("quantize") else ""
    ours = Contender(f"ours{quantized}", OURS, {**settings, "ops": "kernels"}, tuned=True)
    peers = peers_of(timing.against, timing.variants, timing.peer_environment, job)
    if ops == "reference":
        plain = {**settings, "ops": "reference"}
        peers.insert(0, Contender(f"ours{quantized}, plain formulas", OURS, plain, tuned=True))
    if peaks is None:
        peaks = ceilings(MACHINE, say)
    results = compare(ours, peers, job, timing.rounds, say)
    return peaks, records(results, job, peaks)


def measure_startup(command: Startup) -> dict[str, Any]:
    found = startup.measure(
        command.preset, Path(command.data_dir), n_round=command.rounds, whole=command.whole,
        against_torch="torch" in command.against, say=say,
    )  # fmt: skip
    show(startup.table(found))
    return found


def measure_checkpoints(command: Checkpoints) -> dict[str, Any]:
    for name, least in (("interval", 1), ("window", 2), ("saves", 1)):
        if getattr(command, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(command, name)}")
    Manifest.read(Path(command.data_dir) / command.dataset)  # or how to prepare it
    flags = {
        "preset": command.preset, "batch_size": command.batch_size, "dataset": command.dataset,
        "data_dir": command.data_dir, "gradient_accumulation_steps": 1, "dropout": 0.0,
    }  # fmt: skip
    found = checkpoints.measure(flags, command.interval, command.saves, command.window, say)
    show(checkpoints.table(found))
    return found


def measure_growth(command: Growth) -> dict[str, Any]:
    """Every point is a comparison of its own, in new processes, whose memory is then known."""
    subject = subject_of(None, command.preset, random=True)
    plan = [("length", growth.longer(subject.config, seq)) for seq in command.block_sizes]
    plan += [("size", growth.larger(subject.config, size)) for size in command.sizes]
    points: list[dict[str, Any]] = []
    peaks: dict[str, float] | None = None
    for grows, config in plan:
        job = Job("train", config.to_dict(), {}, None, command.batch_size, config.block_size)
        job = dataclasses.replace(job, round_seconds=command.timing.round_seconds)
        say(f"{grows}: {config.n_layer} layers, {config.n_embd} wide, {config.block_size} tokens")
        peaks, rows = timed(job, {"precision": "auto"}, command.ops, command.timing, peaks)
        n_params = rows[0]["params"]
        points.append({
            "grows": grows, "size": f"{n_params / 1e6:.0f}M", "params": n_params,
            "seq": config.block_size, "contenders": rows,
        })  # fmt: skip
    found = {"preset": command.preset, "batch_size": command.batch_size, "ceilings": peaks}
    found = {**found, "points": points}
    show(growth.table(points))
    growth.save(command.out, found, say)
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(found: Any) -> None:
    rich.console.Console(stderr=True, width=150).print(found)


def described(peaks: dict[str, float]) -> str:
    return (
        f"ceilings: {peaks['float32_flops'] / 1e12:.2f} TFLOP/s float32, "
        f"{peaks['bfloat16_flops'] / 1e12:.2f} bfloat16, {peaks['read_bytes_per_s'] / 1e9:.0f} GB/s"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
