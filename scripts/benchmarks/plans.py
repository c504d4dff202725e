"""Plans against runs: python scripts/benchmarks/plans.py.

For each shape, in turn: what scripts/plan.py says of this machine, and what a run of a few steps of
scripts/train.py then takes: its peak of resident memory before the first save, and the median time
of its steps after the first two. One line of JSON goes to stdout.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 8
SHAPES = {
    "1M": "--preset shakespeare-char-cpu",
    "11M": "--preset shakespeare-char --batch_size 32",
    "30M": "--n_layer 6 --n_head 6 --n_embd 384 --block_size 512 --batch_size 8",
    "124M": "--preset gpt2-small --batch_size 2",
    "162M": "--preset gpt2-small --batch_size 1 --n_layer 18 --block_size 512",
    "355M": "--preset gpt2-medium --batch_size 1 --block_size 512",
}
COMMON = "--dataset stdlib --gradient_accumulation_steps 1 --warmup_iters 2 --eval_interval 1000 "


def main() -> int:
    wanted = sys.argv[1:] or list(SHAPES)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "scripts/prepare.py", "stdlib"], cwd=ROOT, check=True)
        for name in wanted:
            flags = f"{SHAPES[name]} {COMMON}".split()
            plan = planned(flags)
            memory, step_s = measured([*flags, "--out_dir", f"{folder}/{name}"])
            result = {
                "shape": name,
                "params": plan["n_params"],
                "memory": [plan["total_memory"], memory],
                "memory_ratio": plan["total_memory"] / memory,
                "step_s": [plan["step_s"], step_s],
                "step_ratio": plan["step_s"] / step_s,
            }
            print(json.dumps(result), file=sys.stderr, flush=True)
            results.append(result)
    print(json.dumps(results))
    return 0


def planned(flags: list[str]) -> dict[str, float]:
    command = [sys.executable, "scripts/plan.py", *flags]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(flags: list[str]) -> tuple[float, float]:
    """Bytes and seconds a step. The last step's line comes before the run's end is saved."""
    command = [
        sys.executable,
        "scripts/train.py",
        *flags,
        "--max_iters",
        "100",
        "--log_interval",
        "1",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"iter {STEPS}/") and "micro" not in line:
                break
        else:
            raise SystemExit(f"the run ended early: {' '.join(command)}")
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        process.kill()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    out_dir = Path(flags[flags.index("--out_dir") + 1])
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").open(encoding="utf-8")]
    ends = [record["elapsed_s"] for record in records if record["iter"] >= 1]
    steps = [b - a for a, b in itertools.pairwise(ends)]
    return 1024.0 * float(peak.split()[1]), statistics.median(steps)


if __name__ == "__main__":
    sys.exit(main())
