"""Do interruptions leave a trace? python scripts/verify_resume.py 20 --preset NAME --flag value"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.common import run_command  # noqa: E402

TRAIN = str(Path(__file__).with_name("train.py"))


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.epilog = "The rest is train.py's. Exit code 1 if a loss, parameter or moment differs."
    parser.add_argument("steps", type=int, help="how many, 3 at least")
    parser.add_argument("--interruptions", type=int, default=3, help="SIGKILL, SIGTERM, ... (3)")
    options, flags = parser.parse_known_args()
    n, draw = options.steps, random.Random(0)
    if n < 3:
        parser.error(f"expected 3 steps or more, got {n}")
    cheap = ["--eval_iters=2", f"--eval_interval={max(1, n // 2)}"]  # changes nothing compared
    fixed = [f"--max_iters={n}", "--log_interval=1", f"--checkpoint_interval={max(1, n // 5)}"]
    with tempfile.TemporaryDirectory(prefix="eqx_gpt_verify_") as place:
        straight, stopped = Path(place) / "straight", Path(place) / "stopped"
        started = [*cheap, *flags, *fixed, "--wandb_log=False"]
        say = partial(print, file=sys.stderr)
        say(f"{n} steps without interruption")
        run([*started, f"--out_dir={straight}"])

        from train.compare import differences
        from train.run import run_config

        mesh = f"--mesh={run_config(straight).mesh}"  # a resumed run would choose anew
        argv = [*started, f"--out_dir={stopped}"]
        for i in range(options.interruptions):
            sent, step = (signal.SIGKILL, signal.SIGTERM)[i % 2], draw.randrange(n - 1)
            say(f"{sent.name} at step {step} or later")
            run(argv, sent, step, draw.random() * 0.3)
            if (stopped / "run.json").exists():
                argv = ["--init_from=resume", f"--out_dir={stopped}", mesh]
        say("the rest without interruption")
        run(argv)
        found = differences(straight, stopped)
    for line in found:
        print(f"DIFFERS: {line}", file=sys.stderr)
    same = "is NOT" if found else "is, bit for bit,"
    print(f"A run of {n} steps, {options.interruptions} times interrupted, {same} the run that was")
    print("not: its steps in order, all losses, the parameters and the optimizer's moments.")
    return 1 if found else 0


def run(argv: list[str], sent: signal.Signals | None = None, step: int = 0, s: float = 0) -> None:
    """To its end or, `s` seconds after it shows `step` or a later one, to the signal."""
    command, said, waiting = [sys.executable, TRAIN, *argv], [], sent is not None
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            found = re.match(r"iter (\d+)/", line)
            if waiting and sent is not None and found and int(found[1]) >= step:
                time.sleep(s)
                process.send_signal(sent)
                waiting = False
    late = any("has done" in line for line in said[-3:])  # the signal before came at the end
    if process.returncode not in (0, -signal.SIGKILL, 143) and not late:
        raise ValueError(f"train.py ended with {process.returncode}:\n{''.join(said[-9:])}")


if __name__ == "__main__":
    sys.exit(run_command(main))
