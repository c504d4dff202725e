"""What one family of Hugging Face models declares, and its config.json read and written.

A family is data: a table of fields, which serves both directions, and a key map. What its files
cannot express is found by writing a config and reading it again.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from eqx_gpt.config import GPTConfig
from weights.errors import WeightsError, raise_problems
from weights.rules import KeyMap


@dataclass(frozen=True)
class Field:
    """A field of config.json: transformers' default, and the places in GPTConfig that it sets.

    `values` translates, from theirs to ours; the first of several names is the one written.
    A field that sets several places is a flag, and true where one of them is.
    """

    default: Any
    paths: tuple[str, ...]
    values: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    - `architecture`: the class of transformers that holds the model with its head.
    - `base`: what all its models have, as place in GPTConfig -> value; otherwise GPTConfig's
      defaults.
    - `fields`: the fields that make the config; `outer.inner` is a field of an object.
    - `aliases`: what old files call a field -> its name in `fields`.
    - `fixed`: name -> the only value that our block computes, which is transformers' default.
    - `dropout`: names of probabilities; written from `GPTConfig.dropout` and not read, for they
      belong to training.
    - `ignored`: names that change nothing in what the model computes from tokens.
    - `key_map`: where the leaves of a model lie, for a config that `from_hf` made.
    - `refusal`: what transformers refuses in a config although our block computes it, or None.
    """

    model_type: str
    architecture: str
    base: Mapping[str, Any]
    fields: Mapping[str, Field]
    aliases: Mapping[str, str]
    fixed: Mapping[str, Any]
    dropout: tuple[str, ...]
    ignored: frozenset[str]
    key_map: Callable[[GPTConfig], KeyMap]
    refusal: Callable[[GPTConfig], str | None] = lambda config: None


HEAD = {True: "tied", False: "untied"}
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Of every config.json: names of things, training, the other heads, and generation's settings,
# which old versions of transformers kept here.
_IGNORED = """
    model_type architectures dtype torch_dtype transformers_version _name_or_path use_cache
    initializer_range problem_type id2label label2id num_labels _num_labels task_specific_params
    output_attentions output_hidden_states output_past return_dict gradient_checkpointing
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix
    tokenizer_class finetuning_task do_sample early_stopping max_length min_length num_beams
    num_beam_groups num_return_sequences temperature top_k top_p typical_p diversity_penalty
    length_penalty repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids begin_suppress_tokens suppress_tokens exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id remove_invalid_values return_dict_in_generate
    output_scores torchscript tf_legacy_loss use_bfloat16 _attn_implementation_autoset
"""
IGNORED = frozenset(_IGNORED.split())
FIXED: Mapping[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
LARGEST_INT = 2**31 - 1

# Of training or of how the computation runs: no part of what a file holds.
NOT_IN_FILES = ("dropout", "unroll", "remat", "n_token")


def from_hf(family: Family, hf: Mapping[str, Any], where: str) -> GPTConfig:
    """The GPTConfig of a parsed config.json, with dropout 0.

    WeightsError that names, all at once, each field of a wrong type, each at a value that our
    block does not compute, and each that nobody here understands. null is the same as absent.
    """
    fixed = {**FIXED, **family.fixed}
    ignored = {*IGNORED, *family.ignored, *family.dropout}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for found_name, value in _flat(hf, family).items():
        name = family.aliases.get(found_name, found_name)
        if value is None or name in ignored:
            continue
        if name in family.fields:
            expected = _expected_instead_of(value, family.fields[name])
            if expected:
                problems.append(f"{found_name} is {value!r:.80}, expected {expected}")
            elif values.setdefault(name, value) != value:
                problems.append(f"{found_name} is {value!r:.80}, elsewhere it is {values[name]!r}")
        elif name not in fixed:
            problems.append(f"{found_name} is {value!r:.80}, a field that is not understood")
        elif value != fixed[name]:
            problems.append(f"{found_name} is {value!r:.80}, only {fixed[name]!r} is supported")
    if problems:
        raise_problems(where, problems)
    parts: dict[str, Any] = {}
    for path, value in family.base.items():
        _set(parts, path, value)
    for name, field in family.fields.items():
        value = values.get(name, field.default)
        for path in field.paths:
            _set(parts, path, value if field.values is None else field.values[value])
    try:
        config = GPTConfig.from_dict(parts)
    except ValueError as error:
        raise_problems(where, [str(error)])
    refusal = family.refusal(config)
    if refusal is not None:
        raise_problems(where, [refusal])
    return config


def to_hf(family: Family, config: GPTConfig) -> dict[str, Any]:
    """All the fields of config.json that the family gives a meaning."""
    hf: dict[str, Any] = dict.fromkeys(family.dropout, config.dropout)
    for name, value in family.fixed.items():
        _set(hf, name, value)
    for name, field in family.fields.items():
        ours = [_get(config, path) for path in field.paths]
        value = ours[0] if len(ours) == 1 else any(ours)
        if field.values is not None:
            value = next(theirs for theirs, our in field.values.items() if our == value)
        _set(hf, name, value)
    return hf


def closest(family: Family, config: GPTConfig) -> tuple[GPTConfig, list[str]]:
    """The config that the family's files hold for `config`, and why they do not hold `config`.

    Without such reasons both configs are the same function of the tokens: biases that only the
    files have are zero, and the padding of the vocabulary is not in them.
    """
    config = dataclasses.replace(config, vocab_size=config.real_vocab_size, n_token=None)
    try:
        held = from_hf(family, to_hf(family, config), "config.json")
    except WeightsError as error:
        return config, [str(error)]
    reasons = []
    for path, theirs in _resolved(held).items():
        ours = _resolved(config)[path]
        zero_bias = path.endswith("bias") and theirs and not ours
        if ours != theirs and not zero_bias:
            reasons.append(f"{path} is {ours!r}, there it is {theirs!r}")
    return dataclasses.replace(held, dropout=config.dropout), reasons


def _flat(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields, with those of objects as `outer.inner` where the family knows such names."""
    objects = {name.split(".")[0] for name in (*family.fields, *family.fixed) if "." in name}
    flat: dict[str, Any] = {}
    for name, value in hf.items():
        if name in objects and isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[name] = value
    return flat


def _expected_instead_of(value: Any, field: Field) -> str | None:
    """What kind of value was expected, judged by the default; None if `value` is one."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    match field.default:
        case bool():
            return None if isinstance(value, bool) else "true or false"
        case float():
            number = whole or isinstance(value, float)
            return None if number and value > 0 and math.isfinite(value) else "a number above 0"
        case str() if field.values is not None:
            known = isinstance(value, str) and value in field.values
            return None if known else f"one of {', '.join(map(repr, field.values))}"
        case _:
            return None if whole and 0 < value <= LARGEST_INT else "a whole number above 0"


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for name in outer:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _get(config: GPTConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _resolved(config: GPTConfig) -> dict[str, Any]:
    """place -> value, with the defaults that depend on other fields filled in."""
    flat: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        elif name not in NOT_IN_FILES:
            flat[name] = value
    return flat | {
        "attention.n_kv_head": config.n_kv_head,
        "attention.head_dim": config.head_dim,
        "mlp.n_inner": config.n_inner,
    }
