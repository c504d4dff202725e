"""What every command shares: how flags are read, how a user's mistake and Ctrl-C end it."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

from train.run import read_run

if TYPE_CHECKING:
    from eqx_gpt import GPT
    from eqx_gpt.tokenizer import Tokenizer

T = TypeVar("T")


def parse(arguments: type[T], default: T | None = None, args: Sequence[str] | None = None) -> T:
    """The command line as a dataclass: `--a_b 1`, `--a_b=1` or `--a-b 1`; booleans take a value.

    `args` are the process's if None.
    """
    config = (tyro.conf.FlagConversionOff,)
    if default is None:
        return tyro.cli(arguments, args=args, config=config, use_underscores=True)
    return tyro.cli(arguments, args=args, default=default, config=config, use_underscores=True)


def model_source(init_from: str, out_dir: str) -> "Callable[[], tuple[GPT, Tokenizer]]":
    """What loads the model that a command names, and its tokenizer: of a run or pretrained.

    ValueError at once if `out_dir` is no run; jax is not imported before the call.
    """
    if init_from == "resume":
        read_run(out_dir)

    def load() -> "tuple[GPT, Tokenizer]":
        import jax

        from eqx_gpt import GPT, get_config
        from weights import from_pretrained, load_tokenizer

        if init_from == "scratch":
            return GPT.init(get_config("gpt2"), key=jax.random.key(0)), load_tokenizer("gpt2")
        place = out_dir if init_from == "resume" else init_from
        return from_pretrained(place), load_tokenizer(place)

    return load


def run_command(main: Callable[[], int]) -> int:
    """The exit code: a user's mistake is one message and 2, Ctrl-C one line and 130.

    Where the reader of stdout has gone, as `head` does, it ends as if by that signal, silently.
    """
    name = Path(sys.argv[0]).stem
    try:
        return main()
    except BrokenPipeError:
        # Python writes what is left when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
