"""Plans against runs: python scripts/benchmarks/plans.py.

For each shape (all, or those named), in turn: what scripts/plan.py says of this machine, and what a
run of a few steps of scripts/train.py then takes: its peak of resident memory before the first
save, and the median time of its steps after the first two. Both compile, for programs that are kept
take less memory. One line of JSON goes to stdout.
"""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, SECONDS = 8, 4.0
"""Of a run, the more of the two."""
ENVIRONMENT = {**os.environ, "EQX_GPT_COMPILATION_CACHE": "off"}
SHAPES = {
    "1M": "--preset shakespeare-char-cpu --dataset chars",
    "11M": "--preset shakespeare-char --dataset chars --batch_size 32",
    "30M": "--dataset bpe --n_layer 6 --n_head 6 --n_embd 384 --block_size 512 --batch_size 8",
    "124M": "--dataset bpe --preset gpt2-small --batch_size 2",
    "162M": "--dataset bpe --preset gpt2-small --batch_size 1 --n_layer 18 --block_size 512",
    "355M": "--dataset bpe --preset gpt2-medium --batch_size 1 --block_size 512",
}
"""Of characters, and of GPT-2's tokens."""
COMMON = "--gradient_accumulation_steps 1 --warmup_iters 2 --eval_interval 1000"


def main() -> int:
    wanted = sys.argv[1:] or list(SHAPES)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        prepared(folder)
        for name in wanted:
            flags = f"{SHAPES[name]} {COMMON} --data_dir {folder}".split()
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


def prepared(folder: str) -> None:
    """This project's own text, in the tokens of both kinds."""
    for name, tokenizer in (("chars", "char"), ("bpe", "gpt2")):
        subprocess.run(
            [
                sys.executable, "scripts/prepare.py", "text", "--files", "eqx_gpt", "train",
                "weights", "--name", name, "--tokenizer", tokenizer, "--data_dir", folder,
            ],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def planned(flags: list[str]) -> dict[str, float]:
    command = [sys.executable, "scripts/plan.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured(flags: list[str]) -> tuple[float, float]:
    """Bytes and seconds a step. The last step's line comes before the run's end is saved."""
    command = [
        sys.executable,
        "scripts/train.py",
        *flags,
        "--max_iters",
        "1000",
        "--log_interval",
        "1",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        begun = 0.0
        for line in process.stderr:
            found = re.match(r"iter (\d+)/\d+ loss", line)
            if found is not None and int(found[1]) == 2:
                begun = time.monotonic()
            if found and int(found[1]) >= STEPS and time.monotonic() - begun > SECONDS:
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
