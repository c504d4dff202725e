"""Low-rank adapters in and out, in the format of PEFT: `load_adapter`, `save_adapter`.

adapter_config.json           what the adapters multiply their changes by, and for which model
adapter_model.safetensors     lora_A (rank, in) and lora_B (out, rank) of each module adapted

Their modules are those of transformers; a family's key rules say which rows of which of our maps
they are. Where several share a map (q, k and v), its adapter holds their factors side by side, in
columns of their own unless the modules share their `lora_A`.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float

from eqx_gpt import lora
from eqx_gpt.gpt import GPT
from eqx_gpt.layers.linear import LowRank
from eqx_gpt.zoo import HUB_IDS
from weights import directory as directories
from weights.directory import replacing
from weights.errors import WeightsError, raise_problems, read_json, write_json
from weights.families import family_for
from weights.hub import Source
from weights.rules import LAYER, KeyMap, Rule
from weights.tensors import DTYPES, StoredTensor, open_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WRITTEN_HERE = re.compile(r"adapter_config\.json|adapter_model\.safetensors")
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

# Whether one of these is set or not, the tensors mean the same.
_IGNORED = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
        "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_config",
        "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
# Those that leave the weights of the model as they are. (PiSSA, say, subtracts from them.)
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Module:
    """The adapter of one module of transformers; its change is scale * b @ a."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def load_adapter(
    model: GPT,
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    model_type: str | None = None,
) -> GPT:
    """The model with the adapters of a directory that PEFT wrote, in place of its own.

    They stay apart from the weights (`eqx_gpt.lora.merge` adds them in) and are float32. Their
    dropout is not taken over: `GPT` has none inside of an adapter.

    **Arguments:**

    - `name_or_path`: a local directory or a hub id, with `revision` as for `from_pretrained`.
    - `model_type`: of transformers, where several families hold such a model; None is the first.

    **Raises:** WeightsError, which names everything that is not such an adapter of this model:
    other methods than LoRA, modules that are no linear map of a block, shapes that do not fit.
    """
    source = adapter_source(name_or_path, revision)
    config = read_json(source.file(CONFIG))
    _check_config(config, f"{source.location}/{CONFIG}")
    if source.find_file(TENSORS) is None:
        raise WeightsError(
            f"{source.location} has no {TENSORS}; if it has adapter_model.bin, a pickle that is "
            "never read here, save it again with safe_serialization=True"
        )
    tensors = open_tensors([source.file(TENSORS)], {})
    parts, problems = _pairs(tensors)
    family, held = family_for(model.config, model_type)
    rules = _rules(model, family.key_map(held).as_in(parts))
    known = {module for rule in rules.values() for module, _ in _modules(rule, model)}
    problems += [f"{module} is no linear map of a block" for module in parts if module not in known]
    modules = {}
    for module in parts.keys() & known:
        try:
            modules[module] = _read(module, *parts[module], config)
        except ValueError as error:
            problems.append(f"{module}: {error}")
    if not problems and not modules:
        problems.append(f"{TENSORS} holds no adapter")
    new = {}
    for name, rule in rules.items() if not problems else ():
        try:
            adapter = _fused(rule, model, lora.targets(model)[name].weight.shape, modules)
        except ValueError as error:
            problems.append(str(error))
            continue
        if adapter is not None:
            new[name] = adapter
    if problems:
        raise_problems(source.location, sorted(problems))
    return lora.attach(model, new)


def save_adapter(
    model: GPT,
    directory: str | Path,
    *,
    base: str | None = None,
    model_type: str | None = None,
) -> None:
    """Writes a model's adapters as a directory that PEFT loads; the model itself is not written.

    The directory is there whole or not at all, and replaces nothing but an adapter.

    **Arguments:**

    - `base`: the name or path of the model that they adapt, for PEFT and `from_pretrained`.
    - `model_type`: of transformers, as for `save_pretrained`.

    **Raises:** WeightsError if the model has no adapters, or no Hugging Face architecture holds it.
    """
    if not lora.adapters(model):
        raise WeightsError("this model has no low-rank adapters; save it with save_pretrained")
    target = check_target(directory)
    family, held = family_for(model.config, model_type)
    key_map = family.key_map(held)
    rules = _rules(model, key_map)
    modules: dict[str, _Module] = {}
    for name, adapter in lora.adapters(model).items():
        modules |= _separated(rules[name], adapter)
    ranks = Counter((len(m.a), m.scale) for m in modules.values())
    (rank, scale), _ = ranks.most_common(1)[0]
    others = {k: m for k, m in modules.items() if (len(m.a), m.scale) != (rank, scale)}
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "target_modules": _target_modules(rules, modules, model),
        "rank_pattern": {k: len(m.a) for k, m in others.items()},
        "alpha_pattern": {k: m.scale * len(m.a) for k, m in others.items()},
        "fan_in_fan_out": any(rule.op == "transpose" for rule in key_map.rules),
    }
    tensors = {}
    for key, module in modules.items():
        tensors[f"base_model.model.{key}.lora_A.weight"] = np.ascontiguousarray(module.a)
        tensors[f"base_model.model.{key}.lora_B.weight"] = np.ascontiguousarray(module.b)
    from safetensors.numpy import save_file

    with replacing(target) as partial:
        write_json(partial / CONFIG, described)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})


def check_target(directory: str | Path) -> Path:
    """Where adapters may be written. WeightsError if that would destroy something else."""
    return directories.check_target(directory, WRITTEN_HERE, "an adapter")


def adapter_source(name_or_path: str | Path, revision: str | None = None) -> Source:
    """Where the files of an adapter are: in a local directory, or else on the hub."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return Source("adapter", str(path))
    return Source("hub", str(name_or_path), revision)


def base_of(source: Source) -> str:
    """The model that an adapter, or those of a run, are for. WeightsError if it does not say."""
    if source.kind == "run":
        start = str(read_json(source.file("run.json")).get("config", {}).get("init_from"))
        # From another directory a relative path would mean something else.
        return str(Path(start).resolve()) if Path(start).exists() else HUB_IDS.get(start, start)
    base = read_json(source.file(CONFIG)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise WeightsError(
            f"{source.location}/{CONFIG}: base_model_name_or_path is {base!r:.80}, expected the "
            "model that the adapter is for; load that one and give it to weights.load_adapter"
        )
    if (Path(base) / CONFIG).exists():
        raise WeightsError(
            f"{source.location}/{CONFIG}: base_model_name_or_path is {base!r}, an adapter itself, "
            "expected a model; merge that one first: python scripts/convert.py"
        )
    return base


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """WeightsError for anything that makes the tensors mean something else."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r:.80}, only 'LORA' is understood")
    if (start := config.get("init_lora_weights", True)) not in _STARTS:
        problems.append(
            f"init_lora_weights is {start!r:.80}, which changes the model's own weights too; save "
            "it with path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r:.80}, only 'none' is understood")
    for name, value in config.items():
        if name not in _IGNORED and value not in (None, False, {}, []):
            problems.append(f"{name} is {value!r:.80}, which is not understood")
    if problems:
        raise_problems(where, problems)


def _pairs(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], list[str]]:
    """Both factors of each module, and what is wrong with the others."""
    found: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        match = TENSOR.fullmatch(key)
        if match is None:
            problems.append(f"{key} is no factor of a linear map's adapter")
        elif tensor.dtype not in DTYPES or len(tensor.shape) != 2 or 0 in tensor.shape:
            problems.append(f"{key} is {tensor.dtype} of shape {tensor.shape}, expected a matrix")
        else:
            found.setdefault(match["module"], {})[match["factor"]] = tensor
    for module, factors in found.items():
        missing = {"A", "B"} - factors.keys()
        problems += [f"{module} has no lora_{factor}" for factor in missing]
    return {m: (f["A"], f["B"]) for m, f in found.items() if len(f) == 2}, problems


def _read(module: str, a: StoredTensor, b: StoredTensor, config: Mapping[str, Any]) -> _Module:
    """ValueError if the ranks differ, or the config has no number to scale by."""
    rank = _of(module, config, "rank_pattern", "r")
    alpha = _of(module, config, "alpha_pattern", "lora_alpha")
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise ValueError(
            f"lora_A of shape {a.shape} and lora_B of {b.shape}, expected rank r = {rank!r:.80}"
        )
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"lora_alpha is {alpha!r:.80}, expected a number other than 0")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return _Module(np.asarray(a.rows, np.float32), np.asarray(b.rows, np.float32), scale)


def _of(module: str, config: Mapping[str, Any], patterns: str, name: str) -> Any:
    """What the config says of a module: by the first pattern that fits the end of its name."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return config.get(name)


def _rules(model: GPT, key_map: KeyMap) -> dict[str, Rule]:
    """The rule of each map's `lora_B`, by the map's name; its keys are the modules.

    The factors lie as (rank, in) and (out, rank) wherever the weight itself is transposed.
    """
    names = lora.targets(model)
    rules = {}
    for rule in key_map.rules:
        name = rule.leaf.removesuffix(".weight")
        if rule.leaf.endswith(".weight") and name in names:
            keys = tuple(key.removesuffix(".weight") for key in rule.keys)
            op = "same" if rule.op == "transpose" else rule.op
            rules[name] = dataclasses.replace(rule, keys=keys, op=op)
    return rules


def _modules(rule: Rule, model: GPT) -> list[tuple[str, int]]:
    """The modules that lie in a map, each with its layer."""
    layers = range(model.config.n_layer)
    return [(key.replace(LAYER, str(layer)), layer) for layer in layers for key in rule.keys]


def _fused(
    rule: Rule, model: GPT, shape: tuple[int, ...], modules: Mapping[str, _Module]
) -> LowRank | None:
    """The adapter of a map that holds these modules; None if none of them is its."""
    n_layer, n_out, n_in = shape
    columns: dict[str, slice] = {}
    a_of_layer: list[list[np.ndarray]] = [[] for _ in range(n_layer)]
    for key, layer in _modules(rule, model):
        if key in modules:
            a = modules[key].a
            if a.shape[1] != n_in:
                raise ValueError(f"{key}: lora_A has shape {a.shape}, expected (rank, {n_in})")
            columns[key] = _columns(a_of_layer[layer], a)
    if not columns:
        return None
    scale = modules[next(iter(columns))].scale
    rank = max(sum(map(len, factors)) for factors in a_of_layer)
    a = np.zeros((n_layer, rank, n_in), np.float32)
    b = np.zeros((n_layer, n_out, rank), np.float32)
    for layer, factors in enumerate(a_of_layer):
        if factors:
            a[layer, : sum(map(len, factors))] = np.concatenate(factors)
    for key, view in rule.views(b):
        if key in columns:
            module, rows = modules[key], view.shape[:-1]
            if len(module.b) != math.prod(rows):
                expected = (math.prod(rows), module.b.shape[1])
                raise ValueError(f"{key}: lora_B has shape {module.b.shape}, expected {expected}")
            own = module.b * np.float32(module.scale / scale)
            view[..., columns[key]] = own.reshape(*rows, -1)

    def low_rank(a: Float[Array, "rank in"], b: Float[Array, "out rank"]) -> LowRank:
        return LowRank(a, b, scale)

    return eqx.filter_vmap(low_rank)(a, b)


def _columns(factors: list[np.ndarray], a: np.ndarray) -> slice:
    """Where `a` lies among the factors of a layer; added at their end unless it is there."""
    first = 0
    for other in factors:
        if np.array_equal(other, a):
            return slice(first, first + len(a))
        first += len(other)
    factors.append(a)
    return slice(first, first + len(a))


def _separated(rule: Rule, adapter: LowRank) -> dict[str, _Module]:
    """The modules in a map's adapter; without those that it does not change, and without the
    columns that change nothing."""
    a, b = np.asarray(adapter.a, np.float32), np.asarray(adapter.b, np.float32)
    trained = bool(b.any())
    found = {}
    layers = [layer for layer in range(len(a)) for _ in rule.keys]
    for layer, (key, view) in zip(layers, rule.views(b), strict=True):
        rows = view.reshape(-1, view.shape[-1])
        used = rows.any(axis=0) if trained else np.full(rows.shape[1], True)
        if used.any():
            found[key] = _Module(a[layer][used], rows[:, used], adapter.scale)
    return found


def _target_modules(
    rules: Mapping[str, Rule], modules: Mapping[str, _Module], model: GPT
) -> list[str]:
    """Names that select these modules and no others: short where all layers are adapted alike."""
    names = []
    for rule in rules.values():
        for key in rule.keys:
            of_key = [key.replace(LAYER, str(i)) for i in range(model.config.n_layer)]
            there = [module for module in of_key if module in modules]
            all_of_them = len(there) == len(of_key)
            names += [key.partition(f"{LAYER}.")[2]] if all_of_them else there
    return names
