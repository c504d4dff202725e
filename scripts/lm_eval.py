"""Scores a model on the harness's tasks: scripts/lm_eval.py --init_from gpt2 --tasks hellaswag"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# `scripts/` comes first otherwise, and this file would hide the package `lm_eval`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.environment import prepare_process  # noqa: E402

prepare_process(__name__)  # may start this anew, so it comes before the slow imports

from scripts.common import model_source, parse, run_command  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Scores a model on tasks of lm-evaluation-harness (pip install 'eqx-gpt[lm-eval]'). Its table
    goes to stderr; the last line on stdout is JSON, with every score under results."""

    tasks: str
    """Names of tasks or groups, with commas between: hellaswag,arc_easy."""
    init_from: str = "resume"
    """resume: the run in out_dir. Or pretrained weights: a model of the zoo, a hub id, a local
    directory, a .gguf file."""
    out_dir: str = "out"
    """The run to score: its best evaluation's model if it kept one, else its newest."""
    include_path: str | None = None
    """A directory with tasks of your own, in YAML."""
    num_fewshot: int | None = None
    """Examples before each question. None: as the task says."""
    limit: float | None = None
    """Only the first so many questions of each task; below 1, a share of them."""
    batch_size: int = 8
    """Sequences run at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""
    apply_chat_template: bool = False
    """Ask in the model's own chat format."""
    gen_kwargs: str | None = None
    """Instead of a task's own for generation: do_sample=True,temperature=0.7,max_gen_toks=64."""
    prefix_token_id: int | None = None
    """The token before a text with nothing before it. None: the tokenizer's own."""
    seed: int = 0
    """Of tasks that sample."""


def main() -> int:
    options = parse(Arguments)
    source = model_source(options.init_from, options.out_dir)
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints, too
        try:
            from eqx_gpt.harness import HarnessLM, evaluate
        except ImportError as error:
            raise ValueError(error) from None
        from eqx_gpt import cast

        def load() -> HarnessLM:
            model, tokenizer = source()
            return HarnessLM(
                cast(model, options.precision), tokenizer, batch_size=options.batch_size,
                prefix_token_id=options.prefix_token_id, seed=options.seed,
            )  # fmt: skip

        result, table = evaluate(
            load, options.tasks.split(","), include_path=options.include_path,
            num_fewshot=options.num_fewshot, limit=options.limit, gen_kwargs=options.gen_kwargs,
            apply_chat_template=options.apply_chat_template,
        )  # fmt: skip
        print(table)
    print(json.dumps({**result, "precision": options.precision}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
