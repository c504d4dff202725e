"""What a run will need: python scripts/plan.py --preset gpt2-xl --device h100:8."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

# `scripts/` comes first otherwise, and `scripts/train.py` would hide the package `train`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.environment import prepare_process  # noqa: E402

prepare_process(__name__)  # may start this anew, so it comes before the slow imports

import tyro  # noqa: E402

from scripts.common import parse, run_command  # noqa: E402
from scripts.cpu_devices import prepare_training  # noqa: E402
from scripts.planning.display import print_plan  # noqa: E402
from scripts.planning.known import size_of  # noqa: E402
from train.config import TrainConfig  # noqa: E402
from train.presets import get_preset  # noqa: E402
from train.resolve import base_config, first_look, without_auto  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Memory, time and cost of the run that scripts/train.py would do with the same flags. One
    line of JSON comes last on stdout."""

    settings: tyro.conf.OmitArgPrefixes[TrainConfig]
    device: str = "here"
    """here (compiled and timed), or accelerators to estimate for: h100, h100:8, a100:4, ..."""
    dollars_per_hour: float | None = None
    """The price of one device. None: a usual one."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A recipe to start from, as in scripts/train.py."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """A JSON file of settings, or a run's run.json."""


def main() -> int:
    argv, auto = without_auto(sys.argv[1:])
    wishes = first_look(argv)
    base, resume = base_config(wishes)
    options = parse(Arguments, Arguments(base), argv)
    config = options.settings
    if resume:
        config = dataclasses.replace(config, init_from=base.init_from)
    recipe = base if wishes.preset is None or resume else get_preset(wishes.preset)
    config.check_together()
    prepare_training(config)
    n_token, train_tokens, pretrained = size_of(config)

    from train.collectives import compiled_traffic
    from train.plan import plan_for, plan_here, planned_model
    from train.traps import traps

    model_cfg = planned_model(config, n_token, pretrained)
    if options.device == "here":
        say = partial(print, file=sys.stderr)
        plan = plan_here(config, model_cfg, auto=auto, say=say)
    else:
        price = options.dollars_per_hour
        plan = plan_for(
            options.device, config, model_cfg, dollars_per_hour=price, traffic=compiled_traffic
        )
    found = traps(config, recipe, plan.n_params, train_tokens)
    print_plan(plan, config, found)
    print(json.dumps({**plan.to_dict(), "traps": [trap.text for trap in found]}))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
