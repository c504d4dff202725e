"""What a benchmark found: a table for a person, one line of JSON for a program."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from scripts.benchmarks.job import Job
from scripts.benchmarks.timing import Result

PACKAGES = ("jax", "equinox", "torch", "transformers", "llama-cpp-python")


def about_machine() -> dict[str, Any]:
    """The processor, its cores, and the versions of what is timed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": _cpu(), "cores": os.cpu_count(), "versions": versions}


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def records(results: list[Result], job: Job, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """The contenders as JSON, ours first. Shares are of the ceilings of the same run."""
    flops_per_token = results[0].facts.get("flops_per_token")
    return [_record(result, job, ceilings, flops_per_token) for result in results]


def _record(
    result: Result, job: Job, ceilings: dict[str, float], flops_per_token: float | None
) -> dict[str, Any]:
    """The FLOPs of a token are the same for everyone: what the model asks for, by the convention
    of `train.metrics.flops_per_token`, not what a contender makes of it."""
    row: dict[str, Any] = {"name": result.contender.name, "tuned": result.contender.tuned}
    if result.error is not None:
        return {**row, "error": result.error}
    row["seconds"] = result.seconds
    if job.task == "load":
        row["bytes_per_s"] = result.rate
    else:
        row["tokens_per_s"] = result.rate
    row |= {"rounds": len(result.rounds), "peak_memory_bytes": result.memory, **result.facts}
    if flops_per_token is not None and job.task in ("train", "prefill"):
        row["flops_per_s"] = result.rate * flops_per_token
        dtype = row.get("dtype", result.contender.settings.get("precision"))
        if dtype in ("float32", "bfloat16", "int8"):
            peak = ceilings["float32_flops" if dtype == "float32" else "bfloat16_flops"]
            row["share_of_matmul_peak"] = row["flops_per_s"] / peak
    if job.task == "decode" and "bytes_per_token" in row:
        row["read_bytes_per_s"] = result.rate * row["bytes_per_token"]
        row["share_of_memory_bandwidth"] = row["read_bytes_per_s"] / ceilings["read_bytes_per_s"]
    if result.ratio is not None:
        row["ours_is_faster"] = result.ratio
        row["ours_is_faster_range"] = [min(result.ratios), max(result.ratios)]
    return row


def table(title: str, rows: list[dict[str, Any]]) -> rich.table.Table:
    """What `records` gives."""
    found = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    found.add_column("contender")
    found.add_column("allocator")
    for name in ("a second", "each", "TFLOP/s", "of the peak", "GB/s", "of the memory", "memory"):
        found.add_column(name, justify="right")
    found.add_column("ours is faster", justify="right")
    for row in rows:
        allocator = "ours" if row["tuned"] else "its own"
        if "error" in row:
            found.add_row(row["name"], allocator, *[""] * 7, "failed")
            continue
        spread = row.get("ours_is_faster_range")
        faster = "" if spread is None else f"{row['ours_is_faster']:.2f}x"
        if spread is not None and row["rounds"] > 1:
            faster += f" ({spread[0]:.2f}-{spread[1]:.2f})"
        found.add_row(
            row["name"],
            allocator,
            f"{row['tokens_per_s']:,.0f} tok" if "tokens_per_s" in row else "",
            f"{row['seconds'] * 1000:,.1f} ms",
            _number(row, "flops_per_s", 1e12),
            _share(row, "share_of_matmul_peak"),
            _number(row, "read_bytes_per_s", 1e9),
            _share(row, "share_of_memory_bandwidth"),
            f"{_number(row, 'peak_memory_bytes', 2**30)} GiB",
            faster,
        )
    return found


def _number(row: dict[str, Any], name: str, unit: float) -> str:
    value = row.get(name)
    return "" if value is None else f"{value / unit:.2f}"


def _share(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.0%}" if name in row else ""
