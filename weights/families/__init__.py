"""The families, one file each: what their config.json and their keys mean."""

from collections.abc import Mapping
from typing import Any

from eqx_gpt.config import GPTConfig, did_you_mean
from weights.errors import WeightsError, raise_problems
from weights.families.gpt2 import GPT2
from weights.families.llama import LLAMA
from weights.family import Family, closest

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA)}


def family_of(hf: Mapping[str, Any], where: str) -> Family:
    """The family that a parsed config.json names. WeightsError if it names none that is known."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str):
        raise WeightsError(f"{where}: model_type is {model_type!r}, expected a string")
    if model_type not in FAMILIES:
        raise WeightsError(
            f"{where}: unknown model_type {model_type!r}; {did_you_mean(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]


def family_for(config: GPTConfig) -> tuple[Family, GPTConfig]:
    """A family whose files can hold a model of `config`, and the config as they hold it.

    WeightsError with the reasons of each family if there is none.
    """
    refusals = []
    for family in FAMILIES.values():
        held, reasons = closest(family, config)
        if not reasons:
            return family, held
        refusals.append(f"{family.model_type}: {'; '.join(reasons)}")
    raise_problems("no Hugging Face architecture known here holds this model", refusals)
