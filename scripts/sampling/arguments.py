"""What `scripts/sample.py` can be asked for, checked before anything slow is imported."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec


def _true_or_false(given: list[str]) -> bool:
    if given and given[0] not in ("True", "False"):
        raise ValueError(f"expected True or False, got {given[0]!r}")
    return given != ["False"]


Switch = Annotated[
    bool,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[{True,False}]",
        instance_from_str=_true_or_false,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A flag that may stand alone."""


@dataclass(frozen=True)
class Arguments:
    """Samples text from a run or from pretrained weights. The text alone goes to stdout."""

    init_from: str = "resume"
    """resume: the run in out_dir. Or pretrained weights: a model of the zoo, a hub id, a local
    directory, a .gguf file. scratch: GPT-2 with random weights, to try it without a download."""
    out_dir: str = "out"
    """The run to sample from: its best evaluation's model if it kept one, else its newest."""
    start: str = "\n"
    """The prompt; FILE:path for the text of a file, - for standard input. Special tokens such as
    <|endoftext|> are taken for what they are."""
    interactive: Switch = False
    """Continue each line of standard input instead, once, until it ends."""
    chat: Switch = False
    """Answer each line of standard input instead, in the model's own chat template."""
    system: str | None = None
    """What the system says first in a chat. None: what the template does by itself."""
    num_samples: int = 10
    """Samples to draw of the prompt."""
    batch_size: int | None = None
    """Samples drawn together. 1: one after the other, each printed as it is made. None: all."""
    max_new_tokens: int = 500
    """Tokens in a sample, after the prompt. A model sees its last block_size tokens; beyond these
    each token costs a pass over all of them."""
    temperature: float = 0.8
    """1.0 is the model's own distribution, less is surer of itself; 0 takes the likeliest token."""
    top_k: int | None = 200
    """Draw from the k likeliest tokens alone. None: from all."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability. None: from all."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the likeliest's probability. None: from all."""
    repetition_penalty: float | None = None
    """Above 1, tokens that were there before become less likely. None: they do not."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text that a sample ends before, besides the model's own end; may be given again."""
    logprobs: Path | None = None
    """A file for the log-probability of each new token under the model itself, in nats, at
    temperature 1 and unfiltered: a JSON object a sample, with `text`, `tokens`, `logprobs`."""
    seed: int = 1337
    """Another seed, other samples. They also depend on batch_size."""
    quantize: Literal["none", "bfloat16", "int8"] = "none"
    """Smaller weights, for speed. int8: perplexity 0.6 % higher, on SmolLM2-135M."""
    draft: str | None = None
    """A small model with the same tokens that proposes what this one then checks: the same
    distribution, sooner; best with one sample at a time. Named as in init_from. None: without."""
    n_draft: int = 4
    """Tokens that the draft proposes at a time."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "n_draft"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.chat and self.interactive:
            raise ValueError("--chat and --interactive both read standard input; give one of them")
        if self.system is not None and not self.chat:
            raise ValueError("--system is for a conversation; give --chat as well")

    def prompt(self) -> str:
        """The text that `start` names."""
        if self.start == "-":
            return sys.stdin.read()
        if self.start.startswith("FILE:"):
            return Path(self.start.removeprefix("FILE:")).read_text(encoding="utf-8")
        return self.start
