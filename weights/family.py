"""What one family of Hugging Face models declares, and its config.json read and written.

A family is data: a table of fields, which serves both directions, groups of those that must be
read together, and a key map. What its files cannot express is found by writing a config and
reading it again.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eqx_gpt.config import GPTConfig
from weights.errors import raise_problems
from weights.groups import LARGEST_INT, Group
from weights.rules import KeyMap


@dataclass(frozen=True)
class Field:
    """A field of config.json: transformers' default, and the places in GPTConfig that it sets.

    `values` translates, from theirs to ours; the first of several names is the one written.
    A field that sets several places is a flag, and true where one of them is. `null` says what
    null in the file means: the default, or a value of its own, which is None in GPTConfig too.
    """

    default: Any
    paths: tuple[str, ...]
    values: Mapping[Any, Any] | None = None
    null: Literal["default", "none"] = "default"
    kind: type | None = None
    """Of the value; None is that of the default, and int if there is no default."""


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    - `architecture`: the class of transformers that holds the model with its head.
    - `base`: what all its models have, as place in GPTConfig -> value; otherwise GPTConfig's
      defaults.
    - `fields`: the fields that make the config.
    - `groups`: of fields that only together say something.
    - `aliases`: what old files call a field -> its name in `fields` or in a group.
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
    key_map: Callable[[GPTConfig], KeyMap]
    groups: tuple[Group, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropout: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    refusal: Callable[[GPTConfig], str | None] = lambda config: None


HEAD = {True: "tied", False: "untied"}
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
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
    cache_implementation transformers.js_config auto_map unsloth_fixed unsloth_version
    _attn_implementation attn_implementation _flash_attn_2_enabled _commit_hash custom_pipelines
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
MOST_LAYERS = 10_000

# Of training or of how the computation runs: no part of what a file holds.
NOT_IN_FILES = ("dropout", "attention_dropout", "unroll", "remat", "n_token")


def from_hf(family: Family, hf: Mapping[str, Any], where: str) -> GPTConfig:
    """The GPTConfig of a parsed config.json, with dropout 0.

    WeightsError that names, all at once, each field of a wrong type, each at a value that our
    block does not compute, and each that nobody here understands. null is the same as absent.
    """
    fixed = {**FIXED, **family.fixed}
    ignored = {*IGNORED, *family.ignored, *family.dropout}
    in_groups = {name for group in family.groups for name in group.names}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for found_name, value in hf.items():
        name = family.aliases.get(found_name, found_name)
        field = family.fields.get(name)
        if name in in_groups or (value is None and field is not None and field.null == "none"):
            if values.setdefault(name, value) != value:
                problems.append(f"{found_name} is {value!r:.80}, elsewhere it is {values[name]!r}")
        elif value is None or name in ignored:
            continue
        elif field is not None:
            expected = _expected_instead_of(value, field)
            if expected:
                problems.append(f"{found_name} is {value!r:.80}, expected {expected}")
            value = float(value) if _kind(field) is float and not expected else value
            if not expected and values.setdefault(name, value) != value:
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
        if config.n_layer > MOST_LAYERS:  # before anything is listed layer by layer
            raise ValueError(f"{config.n_layer} layers are absurd, at most {MOST_LAYERS} are read")
        for group in family.groups:
            config = group.read({k: v for k, v in values.items() if k in group.names}, config)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise_problems(where, [str(error)])
    refusal = family.refusal(config)
    if refusal is not None:
        raise_problems(where, [refusal])
    return config


def to_hf(family: Family, config: GPTConfig) -> dict[str, Any]:
    """All the fields of config.json that the family gives a meaning.

    ValueError if it has no word for a value.
    """
    hf: dict[str, Any] = {
        name: config.weights_dropout if name.startswith("att") else config.dropout
        for name in family.dropout
    }
    for name, field in family.fields.items():
        ours = [_get(config, path) for path in field.paths]
        value = ours[0] if len(ours) == 1 else any(ours)
        if field.values is not None:
            names = [theirs for theirs, our in field.values.items() if our == value]
            if not names:
                raise ValueError(f"{field.paths[0]} is {value!r}, for which {name} has no name")
            value = field.default if field.default in names else names[0]
        if value is not None or field.default is not None:
            hf[name] = value
    for group in family.groups:
        hf |= group.write(config)
    return hf


def closest(family: Family, config: GPTConfig) -> tuple[GPTConfig, list[str]]:
    """The config that the family's files hold for `config`, and why they do not hold `config`.

    Without such reasons both configs are the same function of the tokens: biases that only the
    files have are zero, and the padding of the vocabulary is not in them.
    """
    config = dataclasses.replace(config, vocab_size=config.real_vocab_size, n_token=None)
    try:
        held = from_hf(family, to_hf(family, config), "config.json")
    except ValueError as error:
        return config, [str(error)]
    reasons = []
    for path, theirs in _resolved(held).items():
        ours = _resolved(config)[path]
        if ours != theirs and not _adds_bias(path, theirs, ours):
            reasons.append(f"{path} is {ours!r}, there it is {theirs!r}")
    rates = {"dropout": config.dropout, "attention_dropout": config.attention_dropout}
    return dataclasses.replace(held, **rates), reasons


def adds_biases(held: GPTConfig, config: GPTConfig) -> bool:
    """Whether `held` has biases that `config` has not."""
    ours = _resolved(config)
    return any(_adds_bias(path, theirs, ours[path]) for path, theirs in _resolved(held).items())


def _adds_bias(path: str, theirs: Any, ours: Any) -> bool:
    return path.endswith("bias") and theirs is True and ours is False


def _expected_instead_of(value: Any, field: Field) -> str | None:
    """What kind of value was expected; None if `value` is one."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    kind = _kind(field)
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind is float:
        number = whole or isinstance(value, float)
        return None if number and 0 < value <= sys.float_info.max else "a number above 0"
    if kind is str and field.values is not None:
        known = isinstance(value, str) and value in field.values
        return None if known else f"one of {', '.join(map(repr, field.values))}"
    return None if whole and 0 < value <= LARGEST_INT else "a whole number above 0"


def _kind(field: Field) -> type:
    return field.kind or (int if field.default is None else type(field.default))


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
    n_kind = len(config.layers)
    return flat | {
        "attention.n_kv_head": config.n_kv_head,
        "attention.head_dim": config.head_dim,
        "attention.scale": config.attention.scale or config.head_dim**-0.5,
        "mlp.n_inner": config.n_inner,
        "layers": [config.layers[i % n_kind] for i in range(config.n_layer)],
    }
