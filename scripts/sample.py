"""Samples text from a model: python scripts/sample.py --out_dir DIR --start "Once upon a time"."""

import sys
from pathlib import Path

# `scripts/` comes first otherwise, and `scripts/train.py` would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.environment import prepare_process  # noqa: E402

prepare_process(__name__)  # may start this anew, so it comes before the slow imports

from scripts.common import model_source, parse, run_command  # noqa: E402
from scripts.sampling.arguments import Arguments  # noqa: E402


def main() -> int:
    options = parse(Arguments)
    source = model_source(options.init_from, options.out_dir)
    reads_lines = options.chat or options.interactive
    prompt = "" if reads_lines else options.prompt()

    from scripts.sampling import modes
    from scripts.sampling.speaker import Speaker

    speaker = Speaker(*source(), options)
    if options.chat:
        name = options.out_dir if options.init_from == "resume" else options.init_from
        modes.chat(speaker, name)
    elif options.interactive:
        modes.interactive(speaker)
    else:
        modes.samples(speaker, prompt)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
