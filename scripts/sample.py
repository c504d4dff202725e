"""Samples text from a model: python scripts/sample.py --out_dir DIR --start "Once upon a time"."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# `scripts/` comes first otherwise, and `scripts/train.py` would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.environment import prepare_process  # noqa: E402

prepare_process(__name__)  # may start this anew, so it comes before the slow imports

from scripts.common import model_source, parse, run_command  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Samples text from a run or from pretrained weights. The text alone goes to stdout."""

    init_from: str = "resume"
    """resume: the run in out_dir. Or pretrained weights: a model of the zoo, a hub id, a local
    directory, a .gguf file. scratch: GPT-2 with random weights, to try it without a download."""
    out_dir: str = "out"
    """The run to sample from: its best evaluation's model if it kept one, else its newest."""
    start: str = "\n"
    """The prompt, or FILE:path for the text of a file. <|endoftext|> is the special token."""
    num_samples: int = 10
    """Samples to draw."""
    max_new_tokens: int = 500
    """Tokens in a sample, after the prompt."""
    temperature: float = 0.8
    """1.0 is the model's own distribution, less is bolder; 0 takes the likeliest token."""
    top_k: int | None = 200
    """Draw from the k likeliest tokens alone. None: from all."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability. None: from all."""
    seed: int = 1337
    """Another seed, other samples."""
    quantize: Literal["none", "bfloat16", "int8"] = "none"
    """Smaller weights, for speed. int8: perplexity 0.6 % higher, on SmolLM2-135M."""


def main() -> int:
    options = parse(Arguments)
    if options.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {options.num_samples}")
    source = model_source(options.init_from, options.out_dir)
    if (start := options.start).startswith("FILE:"):
        start = Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")

    import jax

    import eqx_gpt

    model, tokenizer = source()
    if options.quantize != "none":
        model = eqx_gpt.for_inference(model, "int8" if options.quantize == "int8" else None)
    prompt = tokenizer.encode(start, special="token")
    if not prompt:
        raise ValueError("the prompt is empty; give --start some text, such as '\\n'")
    for i in range(options.num_samples):
        tokens = eqx_gpt.generate(
            model,
            prompt,
            options.max_new_tokens,
            key=jax.random.fold_in(jax.random.key(options.seed), i),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
        if i:
            print("---------------", file=sys.stderr, flush=True)
        print(tokenizer.decode(tokens.tolist()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
