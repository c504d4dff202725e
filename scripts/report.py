"""A run as a page and in the terminal, also in progress: python scripts/report.py --out_dir DIR"""

import sys
from dataclasses import dataclass
from pathlib import Path

# `scripts/` comes first otherwise, and `scripts/train.py` would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import rich.console  # noqa: E402

from scripts.common import parse, run_command  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Writes report.html, one file that needs no network: curves, time by phase, samples,
    configuration and environment of a run, also of one in progress; its like goes to stdout.
    Several runs after --out_dir are shown beside each other."""

    out_dir: tuple[Path, ...] = (Path("out"),)
    """The run, or the runs to compare."""
    output: Path | None = None
    """The page to write. None: report.html in the first of the runs."""


def main() -> int:
    options = parse(Arguments)
    if not options.out_dir:
        raise ValueError("--out_dir needs a run directory, or several")
    from train.report import write_report
    from train.report_terminal import report_terminal

    target = options.output or options.out_dir[0] / "report.html"
    try:
        histories = write_report(options.out_dir, target)
    except OSError as error:
        raise ValueError(f"cannot write {str(target)!r}: {error.strerror or error}") from None
    console = rich.console.Console(highlight=False)
    console.print(report_terminal(histories, max(16, min(100, console.width - 60))))
    print(f"written to {target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
