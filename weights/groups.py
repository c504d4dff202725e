"""Fields of config.json that only together say something: rotary positions, kinds of layers."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eqx_gpt.config import (
    GPTConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    PositionConfig,
    RopeScaling,
    YarnScaling,
)

LARGEST_INT = 2**31 - 1
SLIDING, FULL = "sliding_attention", "full_attention"
SHAPE = ("rope_theta", "partial_rotary_factor")  # of rope_parameters, but not of rope_scaling


@dataclass(frozen=True)
class Group:
    """Some fields of config.json, read into a config that the other fields made, and written.

    - `read`: what the file gives of `names` (null where it says null), and the config so far.
      ValueError for what our block does not compute.
    - `write`: the inverse.
    """

    names: frozenset[str]
    read: Callable[[Mapping[str, Any], GPTConfig], GPTConfig]
    write: Callable[[GPTConfig], dict[str, Any]]


def rope(
    *, theta: float = 10_000.0, share: float = 1.0, old: tuple[str, str] | None = None
) -> Group:
    """Rotary positions of the whole model, in transformers' present and former spellings.

    `theta` and `share`, of a head's dimensions that turn, are the defaults; where `share` is 1
    transformers turns whole heads whatever the file says. `old` are the former names of the two,
    if they were not rope_theta and partial_rotary_factor.
    """
    old_theta, old_share = old or ("rope_theta", "partial_rotary_factor")
    names = {"rope_parameters", "rope_scaling", old_theta, old_share}

    def read(hf: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        parameters = _object(hf, "rope_scaling") or _object(hf, "rope_parameters")
        given = {"rope_theta": theta, "partial_rotary_factor": share}
        former = {"rope_theta": hf.get(old_theta), "partial_rotary_factor": hf.get(old_share)}
        given |= {name: value for name, value in former.items() if value is not None}
        position = read_rope({**given, **parameters}, config, partial=share < 1)
        return dataclasses.replace(config, position=position)

    def write(config: GPTConfig) -> dict[str, Any]:
        if config.position.kind != "rope":
            return {}
        parameters = write_rope(config.position, config)
        if share == 1.0:
            parameters = _whole(parameters)
        hf: dict[str, Any] = {"rope_parameters": parameters}
        # Versions of transformers before 5 read these instead.
        hf[old_theta] = parameters["rope_theta"]
        if "partial_rotary_factor" in parameters:
            hf[old_share] = parameters["partial_rotary_factor"]
        if config.position.rope_scaling is not None:
            hf["rope_scaling"] = {k: v for k, v in parameters.items() if k not in SHAPE}
        return hf

    return Group(frozenset(names), read, write)


def _whole(parameters: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters without the share of a head where that is 1."""
    share = parameters["partial_rotary_factor"]
    return {k: v for k, v in parameters.items() if k != "partial_rotary_factor" or share != 1.0}


def read_rope(
    parameters: Mapping[str, Any], config: GPTConfig, *, partial: bool = True
) -> PositionConfig:
    """The positions that a rope_parameters object says. ValueError names what is not known.

    `partial`: whether a part of a head may turn.
    """
    left = {name: value for name, value in parameters.items() if value is not None}
    kind = left.pop("rope_type", left.pop("type", "default"))
    left.pop("type", None)
    theta = _positive(left, "rope_theta")
    share = _positive(left, "partial_rotary_factor", 1.0)
    if share > 1 or (share < 1 and not partial):
        raise ValueError(f"partial_rotary_factor is {share}, only 1.0 is supported")
    dim = int(config.head_dim * share)
    length = left.pop("original_max_position_embeddings", config.block_size)
    if not _is_whole(length):
        expected = "expected a whole number above 0"
        raise ValueError(f"original_max_position_embeddings is {length!r:.80}, {expected}")
    scaling: RopeScaling | None
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(_positive(left, "factor"))
        case "llama3":
            low, high = (_positive(left, f"{x}_freq_factor") for x in ("low", "high"))
            scaling = Llama3Scaling(_positive(left, "factor"), low, high, length)
        case "yarn":
            attention = left.pop("attention_factor", None)
            fast, slow = _positive(left, "beta_fast", 32.0), _positive(left, "beta_slow", 1.0)
            truncate = left.pop("truncate", True)
            if not isinstance(truncate, bool) or theta <= 1:
                raise ValueError(
                    f"yarn has truncate={truncate!r:.80} and rope_theta={theta}, expected true or "
                    "false and a number above 1"
                )
            factor = _positive(left, "factor")
            scaling = YarnScaling(factor, length, attention, fast, slow, truncate)
        case _:
            raise ValueError(
                f"rope_type is {kind!r:.80}, only 'default', 'linear', 'llama3' and 'yarn' are "
                "supported"
            )
    for name, value in left.items():
        raise ValueError(f"{name} of rope_type {kind!r} is {value!r:.80}, which is not understood")
    whole = dim == config.head_dim
    return PositionConfig(
        "rope", rope_theta=theta, rope_dim=None if whole else dim, rope_scaling=scaling
    )


def write_rope(position: PositionConfig, config: GPTConfig) -> dict[str, Any]:
    """The inverse of `read_rope`."""
    dim = config.head_dim if position.rope_dim is None else position.rope_dim
    share = dim / config.head_dim
    if int(config.head_dim * share) != dim:  # a rounding error below a whole number
        share = math.nextafter(share, 1.0)
    hf = {"rope_theta": position.rope_theta, "partial_rotary_factor": share}
    match position.rope_scaling:
        case None:
            return {"rope_type": "default", **hf}
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor, **hf}
        case Llama3Scaling() | YarnScaling() as scaling:
            fields = dataclasses.asdict(scaling)
            kind = fields.pop("kind")
            fields["original_max_position_embeddings"] = fields.pop("original_block_size")
            defaults = {field.name: field.default for field in dataclasses.fields(scaling)}
            fields = {k: v for k, v in fields.items() if k not in defaults or v != defaults[k]}
            return {"rope_type": kind, **fields, **hf}


def query_scale() -> Group:
    """Scores are divided by the root of query_pre_attn_scalar, whatever the width of a head."""

    def read(hf: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        scale = _positive(dict(hf), "query_pre_attn_scalar", 256.0) ** -0.5
        attention = dataclasses.replace(config.attention, scale=scale)
        return dataclasses.replace(config, attention=attention)

    def write(config: GPTConfig) -> dict[str, Any]:
        scale = config.attention.scale or config.head_dim**-0.5
        return {"query_pre_attn_scalar": round(scale**-2)}

    return Group(frozenset({"query_pre_attn_scalar"}), read, write)


def window(default: int | None) -> Group:
    """One sliding window for all layers, or none."""

    def read(hf: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        size = window_size(hf, "sliding_window", default)
        return dataclasses.replace(config, layers=(LayerConfig(size),))

    def write(config: GPTConfig) -> dict[str, Any]:
        return {"sliding_window": config.layers[0].window}

    return Group(frozenset({"sliding_window"}), read, write)


def late_windows() -> Group:
    """Qwen's: a sliding window, where use_sliding_window says so, from layer max_window_layers on
    or where layer_types says."""

    def read(hf: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        size = window_size(hf, "sliding_window", 4096) if _flag(hf) else None
        first = hf.get("max_window_layers", 28)
        if first != 0 and not _is_whole(first):
            raise ValueError(f"max_window_layers is {first!r:.80}, expected a whole number")
        by_rule = [FULL if i < first else SLIDING for i in range(config.n_layer)]
        types = _layer_types(hf, config) or by_rule
        return dataclasses.replace(config, layers=_of_types(types, LayerConfig(size)))

    def write(config: GPTConfig) -> dict[str, Any]:
        size, types = _written(config)
        first = types.index(SLIDING) if SLIDING in types else config.n_layer
        window = {"use_sliding_window": size is not None, "sliding_window": size}
        return {**window, "max_window_layers": first, "layer_types": types}

    names = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
    return Group(frozenset(names), read, write)


def alternating_windows(every: int) -> Group:
    """A sliding window in all layers but each `every`-th, or where layer_types says."""

    def read(hf: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        size = window_size(hf, "sliding_window", 4096)
        types = _layer_types(hf, config) or _all_but_each(every, config.n_layer)
        return dataclasses.replace(config, layers=_of_types(types, LayerConfig(size)))

    def write(config: GPTConfig) -> dict[str, Any]:
        size, types = _written(config)
        window = {} if size is None else {"sliding_window": size}
        return {**window, "layer_types": types}

    return Group(frozenset({"sliding_window", "layer_types"}), read, write)


def two_ropes(every: int, theta: float = 1_000_000.0, local_theta: float = 10_000.0) -> Group:
    """Gemma 3's: `alternating_windows`, and the layers with a window have a rope of their own."""
    windows = alternating_windows(every)
    names = {"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"}
    names |= {"sliding_window_pattern", "_sliding_window_pattern"}

    def read(hf: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        step = _period_of(hf, every, "sliding_window_pattern", "_sliding_window_pattern")
        both = _object(hf, "rope_parameters")
        if both.keys() - {SLIDING, FULL}:
            raise ValueError(f"rope_parameters has {sorted(both)}, expected {SLIDING} and {FULL}")
        own = {"rope_theta": _or(hf.get("rope_theta"), theta), **_object(hf, "rope_scaling")}
        own |= _object(both, FULL)
        local = {"rope_theta": _or(hf.get("rope_local_base_freq"), local_theta)}
        local |= _object(both, SLIDING)
        of_local = LayerConfig(
            window_size(hf, "sliding_window", 4096), read_rope(local, config, partial=False)
        )
        types = _layer_types(hf, config) or _all_but_each(step, config.n_layer)
        return dataclasses.replace(
            config,
            position=read_rope(own, config, partial=False),
            layers=_of_types(types, of_local),
        )

    def write(config: GPTConfig) -> dict[str, Any]:
        positions = [x.position for x in config.layers if x.position is not None]
        local = write_rope(positions[0] if positions else PositionConfig("rope"), config)
        own, local = _whole(write_rope(config.position, config)), _whole(local)
        hf = {**windows.write(config), "rope_parameters": {FULL: own, SLIDING: local}}
        # Versions of transformers before 5 read these instead.
        hf["rope_theta"], hf["rope_local_base_freq"] = own["rope_theta"], local["rope_theta"]
        if config.position.rope_scaling is not None:
            hf["rope_scaling"] = {k: v for k, v in own.items() if k not in SHAPE}
        return hf

    return Group(windows.names | names, read, write)


def some_ropes(every: int = 4) -> Group:
    """SmolLM3's: no rotary positions in each `every`-th layer, or where no_rope_layers is 0; a
    sliding window, if one is used, in those layers or where layer_types says."""

    def read(hf: Mapping[str, Any], config: GPTConfig) -> GPTConfig:
        n_layer = config.n_layer
        step = _period_of(hf, every, "no_rope_layer_interval")
        turned = hf.get("no_rope_layers") or [int((i + 1) % step != 0) for i in range(n_layer)]
        if not isinstance(turned, list) or len(turned) != n_layer or set(turned) - {0, 1}:
            raise ValueError(f"no_rope_layers is {turned!r:.80}, expected {n_layer} times 0 or 1")
        size = window_size(hf, "sliding_window", None) if _flag(hf) else None
        types = _layer_types(hf, config) or [FULL if turn else SLIDING for turn in turned]
        layers = [
            LayerConfig(size if kind == SLIDING else None, None if turn else PositionConfig("none"))
            for kind, turn in zip(types, turned, strict=True)
        ]
        return dataclasses.replace(config, layers=period(layers))

    def write(config: GPTConfig) -> dict[str, Any]:
        size, types = _written(config)
        layers = range(config.n_layer)
        turned = [int(config.layer_position(i).kind == "rope") for i in layers]
        window = {"use_sliding_window": size is not None, "sliding_window": size}
        return {**window, "no_rope_layers": turned, "layer_types": types}

    names = {"no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window"}
    return Group(frozenset({*names, "layer_types"}), read, write)


def _layer_types(hf: Mapping[str, Any], config: GPTConfig) -> list[str] | None:
    """The field layer_types, if given. ValueError if it is no list of known types, one a layer."""
    types = hf.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != config.n_layer:
        raise ValueError(f"layer_types is {types!r:.80}, expected a list of {config.n_layer} types")
    for kind in types:
        if kind not in (SLIDING, FULL):
            raise ValueError(f"layer_types names {kind!r:.80}, known: {SLIDING}, {FULL}")
    return types


def _all_but_each(every: int, n_layer: int) -> list[str]:
    return [SLIDING if (i + 1) % every else FULL for i in range(n_layer)]


def _of_types(types: Sequence[str], sliding: LayerConfig) -> tuple[LayerConfig, ...]:
    return period([sliding if kind == SLIDING else LayerConfig() for kind in types])


def _written(config: GPTConfig) -> tuple[int | None, list[str]]:
    """The largest window, and the type of each layer."""
    n = len(config.layers)
    windows = [config.layers[i % n].window for i in range(config.n_layer)]
    size = max((window for window in windows if window is not None), default=None)
    return size, [FULL if window is None else SLIDING for window in windows]


def period(layers: Sequence[LayerConfig]) -> tuple[LayerConfig, ...]:
    """The shortest beginning of `layers` that makes all of them when repeated."""
    for n in range(1, len(layers)):
        if all(layer == layers[i % n] for i, layer in enumerate(layers)):
            return tuple(layers[:n])
    return tuple(layers)


def window_size(hf: Mapping[str, Any], name: str, default: int | None) -> int | None:
    size = hf.get(name, default)
    if size is not None and not _is_whole(size):
        raise ValueError(f"{name} is {size!r:.80}, expected a whole number above 0 or null")
    return size


def _flag(hf: Mapping[str, Any]) -> bool:
    used = _or(hf.get("use_sliding_window"), False)
    if not isinstance(used, bool):
        raise ValueError(f"use_sliding_window is {used!r:.80}, expected true or false")
    return used


def _period_of(hf: Mapping[str, Any], default: int, *names: str) -> int:
    """The first of these fields that is given: how many layers make a period."""
    for name in names:
        if hf.get(name) is not None:
            if not _is_whole(hf[name]):
                raise ValueError(f"{name} is {hf[name]!r:.80}, expected a whole number above 0")
            return hf[name]
    return default


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_INT


def _object(hf: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = hf.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r:.80}, expected an object")
    return value or {}


def _positive(values: dict[str, Any], name: str, default: float | None = None) -> float:
    """Takes a number above 0 out of `values`."""
    value = values.pop(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} is {value!r:.80}, expected a number above 0")
    return float(value)
