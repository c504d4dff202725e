"""From what a user asked for to a config and its data: preset < file < flags, or a run's own."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.config import TrainConfig, read_config_file, with_fields
from train.datasets import OPTIONS, is_prepared, prepare
from train.manifest import DatasetError, Manifest
from train.presets import get_preset
from train.run import has_run, run_config

FALLBACK = "stdlib"


@dataclass(frozen=True)
class Wishes:
    """What the command line said, but for the flags that override single settings.

    `flags` are those given of `init_from`, `out_dir` and `dataset`: they decide which config the
    other flags override.
    """

    preset: str | None
    file: str | None
    flags: Mapping[str, str]


def without_auto(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The flags but for `--batch_size auto`, and whether that was among them."""
    kept, i = list(argv), 0
    while i < len(kept):
        if kept[i] in ("--batch_size=auto", "--batch-size=auto"):
            return kept[:i] + kept[i + 1 :], True
        if kept[i] in ("--batch_size", "--batch-size") and kept[i + 1 : i + 2] == ["auto"]:
            return kept[:i] + kept[i + 2 :], True
        i += 1
    return kept, False


def first_look(argv: Sequence[str]) -> Wishes:
    """--preset, --config, and the flags that decide what the others override."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "init_from", "out_dir", "dataset"):
        parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest=name)
    found = vars(parser.parse_known_args(argv)[0])
    flags = {k: v for k, v in found.items() if v is not None and k not in ("preset", "config")}
    return Wishes(found["preset"], found["config"], flags)


def base_config(wishes: Wishes) -> tuple[TrainConfig, bool]:
    """The config that the flags override, and whether it is that of a run to resume.

    To resume, the run's own config stands in place of preset and file, which then only say where
    the run is; its `init_from` says what the run once started from. Its mesh is chosen anew, for
    the devices may be others.
    """
    config = TrainConfig() if wishes.preset is None else get_preset(wishes.preset)
    if wishes.file is not None:
        config = with_fields(config, read_config_file(wishes.file), wishes.file)
    if wishes.flags.get("init_from", config.init_from) != "resume":
        return config, False
    given = wishes.flags.get("out_dir")
    places = [config.out_dir, _fallback_place(config)] if given is None else [given]
    out_dir = next(filter(has_run, places), places[0])
    return dataclasses.replace(run_config(out_dir), out_dir=out_dir, mesh="auto"), True


def open_data(
    wishes: Wishes, config: TrainConfig, *, alone: bool = True
) -> tuple[TrainConfig, Manifest, str | None]:
    """For a new run: its config, its dataset, verified, and what the user should be told.

    A preset whose own dataset is not prepared trains on the standard library's source instead,
    in a directory of its own: the returned config says so. A dataset that the user named has to
    be there. DatasetError if it is not, or is damaged; also, unless this process is `alone`, if
    the standard library's is still to be prepared.
    """
    said = None
    in_file = wishes.file is not None and "dataset" in read_config_file(wishes.file)
    chosen = in_file or "dataset" in wishes.flags
    if not chosen and not is_prepared(Path(config.data_dir) / config.dataset):
        where = "" if config.data_dir == "data" else f" --data_dir {config.data_dir}"
        if config.dataset not in OPTIONS:  # in another model's tokens, which stdlib's are not
            raise DatasetError(
                f"dataset {config.dataset!r} is not prepared; make it of a text: python "
                f"scripts/prepare.py text --files FILE --name {config.dataset} --tokenizer "
                f"{config.init_from}{where}"
            )
        said = (
            f"DATASET {config.dataset!r} IS NOT PREPARED: training on {FALLBACK!r} instead, the "
            f"source of Python's standard library. To prepare it: python scripts/prepare.py "
            f"{config.dataset}{where}"
        )
        out_dir = wishes.flags.get("out_dir", _fallback_place(config))
        config = dataclasses.replace(config, dataset=FALLBACK, out_dir=out_dir)
    directory = Path(config.data_dir) / config.dataset
    if config.dataset == FALLBACK and not is_prepared(directory):
        if not alone:
            raise DatasetError(
                f"each of the run's processes would prepare {FALLBACK!r} in {config.data_dir!r} at "
                f"once; do it before: python scripts/prepare.py {FALLBACK}"
            )
        prepare(FALLBACK, Path(config.data_dir))
    return config, Manifest.read(directory), said


def _fallback_place(config: TrainConfig) -> str:
    return f"{config.out_dir}-{FALLBACK}"
