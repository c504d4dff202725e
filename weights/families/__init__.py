"""The families, one file each: what their config.json and their keys mean."""

from collections.abc import Mapping
from typing import Any

from eqx_gpt.config import GPTConfig, did_you_mean
from weights.errors import WeightsError, raise_problems
from weights.families.gemma import GEMMA
from weights.families.gemma2 import GEMMA2
from weights.families.gemma3_text import GEMMA3_TEXT
from weights.families.gpt2 import GPT2
from weights.families.gpt_neo import GPT_NEO
from weights.families.gpt_neox import GPT_NEOX
from weights.families.gptj import GPTJ
from weights.families.llama import LLAMA
from weights.families.mistral import MISTRAL
from weights.families.olmo import OLMO
from weights.families.olmo2 import OLMO2
from weights.families.opt import OPT
from weights.families.phi import PHI
from weights.families.qwen2 import QWEN2
from weights.families.qwen3 import QWEN3
from weights.families.smollm3 import SMOLLM3
from weights.families.starcoder2 import STARCODER2
from weights.family import Family, adds_biases, closest

_ALL = (
    GPT2,
    LLAMA,
    GPT_NEO,
    GPTJ,
    GPT_NEOX,
    OPT,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3_TEXT,
    PHI,
    OLMO,
    OLMO2,
    SMOLLM3,
    STARCODER2,
)
NEAREST = 3  # families that an error speaks of
FAMILIES = {family.model_type: family for family in _ALL}


def family_of(hf: Mapping[str, Any], where: str) -> Family:
    """The family that a parsed config.json names. WeightsError if it names none that is known."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str):
        raise WeightsError(f"{where}: model_type is {model_type!r:.80}, expected a string")
    if model_type not in FAMILIES:
        raise WeightsError(
            f"{where}: unknown model_type {model_type[:80]!r}; "
            f"{did_you_mean(model_type[:80], FAMILIES)}"
        )
    return FAMILIES[model_type]


def family_for(config: GPTConfig, model_type: str | None = None) -> tuple[Family, GPTConfig]:
    """A family whose files can hold a model of `config`, and the config as they hold it.

    The one of `model_type`, or the first in the order of `FAMILIES`, before it one whose files
    add no biases. WeightsError if there is none, with what keeps the nearest from it.
    """
    if model_type is not None and model_type not in FAMILIES:
        near = did_you_mean(model_type, FAMILIES)
        raise WeightsError(f"unknown model_type {model_type!r}; {near}")
    refusals: list[tuple[str, list[str]]] = []
    with_more: list[tuple[Family, GPTConfig]] = []
    for family in [FAMILIES[model_type]] if model_type else FAMILIES.values():
        held, reasons = closest(family, config)
        if reasons:
            refusals.append((family.model_type, reasons))
        elif adds_biases(held, config):
            with_more.append((family, held))
        else:
            return family, held
    if with_more:
        return with_more[0]
    if model_type is not None:
        reasons = "; ".join(refusals[0][1])
        raise WeightsError(f"a {model_type} of transformers is not this model: {reasons}")
    nearest = sorted(refusals, key=lambda refusal: len(refusal[1]))[:NEAREST]
    subject = "no Hugging Face architecture known here holds this model; the nearest"
    raise_problems(subject, [f"{name}: {'; '.join(reasons)}" for name, reasons in nearest])
