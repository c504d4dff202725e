"""Trains a GPT: python scripts/train.py --preset NAME [--flag value ...]."""

import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

# `scripts/` comes first otherwise, and this file would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.environment import describe_process, prepare_process  # noqa: E402

prepare_process(__name__)  # may start this anew, so it comes before the slow imports

import tyro  # noqa: E402

from scripts.common import parse, run_command  # noqa: E402
from scripts.cpu_devices import prepare_training  # noqa: E402
from scripts.planning.known import with_chosen_batch  # noqa: E402
from train.cluster import Hosts  # noqa: E402
from train.config import TrainConfig  # noqa: E402
from train.manifest import Manifest, check_same_tokenizer  # noqa: E402
from train.presets import PRESETS  # noqa: E402
from train.resolve import base_config, first_look, open_data, without_auto  # noqa: E402
from train.run import has_checkpoint  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Trains a GPT. Flags win over the file of --config, which wins over the preset."""

    settings: tyro.conf.OmitArgPrefixes[TrainConfig]
    hosts: tyro.conf.OmitArgPrefixes[Hosts]
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A recipe to start from: one of those listed above. None: TrainConfig's defaults."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """A JSON file of settings, whole or partial, or a run's run.json to do it again."""


Arguments.__doc__ = f"{Arguments.__doc__}\n\nPresets: {', '.join(PRESETS)}."


def main() -> int:
    argv, auto = without_auto(sys.argv[1:])
    wishes = first_look(argv)
    base, resume = base_config(wishes)
    arguments = parse(Arguments, Arguments(base, Hosts(), wishes.preset, wishes.file), argv)
    config, hosts = arguments.settings, arguments.hosts
    config = dataclasses.replace(config, init_from=base.init_from) if resume else config
    prepare_training(config, alone=hosts.alone)  # before there are threads
    if resume:
        data = Manifest.read(Path(config.data_dir) / config.dataset)
    else:
        config, data, said = open_data(wishes, config, alone=hosts.alone)
        if said:
            print(said, file=sys.stderr)
    if auto and not resume:  # which keeps its own
        config = with_chosen_batch(config, alone=hosts.alone)

    # jax is imported from here on: a mistyped flag need not wait for it.
    from train.loop import train

    pretrained = None
    if config.init_from != "scratch" and not (resume and has_checkpoint(config.out_dir)):
        from weights import from_pretrained
        from weights.tokenizer import find_tokenizer

        if (tokenizer := find_tokenizer(config.init_from)) is not None:
            check_same_tokenizer(data, tokenizer)
        pretrained = partial(from_pretrained, config.init_from)
    return train(
        config, data, pretrained=pretrained, resume=resume, process=describe_process(),
        hosts=hosts, preset=wishes.preset,
    ).exit_code  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
