"""How XLA makes its loops for a CPU: with whole vector registers, and several results a loop."""

import os

from scripts.processor import computes_on_cpu, has_512_bits

_WIDTH = "--xla_cpu_prefer_vector_width"
_BACKEND_OPTIONS = "--xla_backend_extra_options"
_SEVERAL = "xla_cpu_use_multi_output_fusion"


def use_whole_vectors() -> None:
    """Before jax is imported: on a CPU with registers of 512 bits ask for all of them.

    XLA by itself takes half. What `XLA_FLAGS` says of it already stays.
    """
    flags = xla_flags()
    if has_512_bits() and not any(_WIDTH in flag for flag in flags):
        set_xla_flags([*flags, f"{_WIDTH}=512"])


def fuse_results() -> None:
    """Before jax computes: let a loop have several results, so that an optimizer's averages and
    weights are made in one pass over memory instead of three.

    Other options of the backend in `XLA_FLAGS` stay, and so does what they say of this one.
    """
    flags = xla_flags()
    if any(_SEVERAL in flag for flag in flags):
        return
    options = [i for i, flag in enumerate(flags) if flag.startswith(f"{_BACKEND_OPTIONS}=")]
    if options:
        flags[options[-1]] += f",{_SEVERAL}=true"
    else:
        flags.append(f"{_BACKEND_OPTIONS}={_SEVERAL}=true")
    set_xla_flags(flags)


def prepare_optimizer(name: str) -> None:
    """Once a command knows which optimizer it will run, before jax computes anything.

    With `fuse_results`, Adafactor's step would hold one copy more of all weights, and its user has
    no memory to spare.
    """
    if name != "adafactor" and computes_on_cpu():
        fuse_results()


def xla_flags() -> list[str]:
    return os.environ.get("XLA_FLAGS", "").split()


def set_xla_flags(flags: list[str]) -> None:
    os.environ["XLA_FLAGS"] = " ".join(flags)
