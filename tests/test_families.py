"""Every family, on the tiny models of tests/fixtures, which transformers made and computed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import eqx_gpt
from eqx_gpt import GPT
from weights import WeightsError, from_pretrained, save_pretrained
from weights.families import FAMILIES, family_for
from weights.family import closest, from_hf, to_hf
from weights.groups import read_rope, write_rope

FIXTURES = Path(__file__).parent / "fixtures"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Any:
    """The family's name, our model of its fixture, and what transformers computed."""
    directory = FIXTURES / request.param
    return request.param, from_pretrained(directory), load_file(directory / "expected.safetensors")


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((FIXTURES / model_type / "config.json").read_text()), **changes}


def test_every_family_has_a_fixture() -> None:
    assert {path.name for path in FIXTURES.iterdir()} == FAMILIES.keys()


def test_logits(case: tuple[str, GPT, dict[str, np.ndarray]]) -> None:
    _, model, expected = case
    logits = eqx.filter_jit(model)(expected["tokens"])
    largest = np.abs(expected["logits"]).max()
    assert np.abs(np.asarray(logits) - expected["logits"]).max() <= 2e-5 * largest


def test_greedy_continuation(case: tuple[str, GPT, dict[str, np.ndarray]]) -> None:
    _, model, expected = case
    found = eqx_gpt.generate(model, expected["tokens"], 16, temperature=0.0)
    assert np.array_equal(found, expected["continued"])
    assert len(np.unique(expected["continued"][:, 13:])) > 3  # otherwise it would prove little


def test_round_trip(case: tuple[str, GPT, dict[str, np.ndarray]], tmp_path: Path) -> None:
    """Every tensor bit for bit, and the config: its meaning, and the family."""
    name, model, _ = case
    theirs = FIXTURES / name
    save_pretrained(from_pretrained(theirs, dtype="bfloat16"), tmp_path)
    before, after = (load_file(d / "model.safetensors") for d in (theirs, tmp_path))
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype
        assert before[key].tobytes() == after[key].tobytes(), key
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == name
    assert from_hf(FAMILIES[name], written, "") == model.config


def test_unknown_fields_are_refused_in_every_family(
    case: tuple[str, GPT, dict[str, np.ndarray]],
) -> None:
    family = FAMILIES[case[0]]
    hf = config_of(case[0], alibi=True, n_experts=3)
    with pytest.raises(WeightsError, match=r"(?s)alibi is True, a field.*n_experts is 3, a field"):
        from_hf(family, hf, "config.json")


# What several families have


ROPE = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.5},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
]


@pytest.mark.parametrize("parameters", ROPE, ids=lambda p: p["rope_type"])
def test_rope_parameters_there_and_back(parameters: dict[str, Any]) -> None:
    config = eqx_gpt.GPTConfig()
    position = read_rope(parameters, config)
    assert write_rope(position, config) == {**parameters, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize("head_dim", [44, 64, 98, 148])
def test_every_share_of_a_head_there_and_back(head_dim: int) -> None:
    """The share is a fraction that transformers multiplies and cuts to a whole number."""
    attention = eqx_gpt.AttentionConfig(head_dim=head_dim)
    config = eqx_gpt.GPTConfig(attention=attention)
    for dim in range(2, head_dim + 1, 2):
        position = eqx_gpt.PositionConfig("rope", rope_dim=None if dim == head_dim else dim)
        written = write_rope(position, config)
        assert int(head_dim * written["partial_rotary_factor"]) == dim
        assert read_rope(written, config) == position


@pytest.mark.parametrize(
    ("model_type", "former"),
    [
        ("llama", {"rope_theta": 500.0}),
        ("llama", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3}}),
        ("phi", {"rope_theta": 500.0, "partial_rotary_factor": 0.25}),
        ("gpt_neox", {"rotary_emb_base": 500, "rotary_pct": 0.75}),
        ("gemma3_text", {"rope_theta": 500, "rope_local_base_freq": 70}),
        (
            "gemma3_text",
            {
                "rope_theta": 500,
                "rope_local_base_freq": 70,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 3,
                "layer_types": None,
            },
        ),
    ],
)
def test_former_spellings_mean_the_same(model_type: str, former: dict[str, Any]) -> None:
    """What files say that were written before transformers 5."""
    family = FAMILIES[model_type]
    hf = {k: v for k, v in config_of(model_type).items() if k != "rope_parameters"}
    config = from_hf(family, {**hf, **former}, "")
    assert config.position.rope_theta == 500.0
    scaling = former.get("rope_scaling")
    if scaling is None:
        assert config.position.rope_scaling is None
    else:
        assert config.position.rope_scaling == eqx_gpt.LinearScaling(float(scaling["factor"]))
    share = former.get("partial_rotary_factor", former.get("rotary_pct"))
    dim = None if share is None else int(config.head_dim * share)
    assert config.position.rope_dim == dim
    written = to_hf(family, config)
    assert from_hf(family, written, "") == config
    for name, value in former.items():  # so that those versions still read our files
        if name not in ("rope_scaling", "sliding_window_pattern", "layer_types"):
            assert written[name] == value
    if model_type == "gemma3_text":
        assert config.layers[0].position == eqx_gpt.PositionConfig("rope", rope_theta=70.0)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dyn"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is None, expected a number"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor is -1, expect"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "x of rope_type"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ("llama", {"rope_scaling": None, "rope_parameters": {"rope_theta": "x"}}, "rope_theta is"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved is True, only False"),
        ("llama", {"num_hidden_layers": 2**31 - 1}, "layers are absurd"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types is"),
        ("gemma2", {"layer_types": ["chunked"] * 3}, "layer_types names 'chunked'"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0, expected a whole number"),
        ("gemma2", {"query_pre_attn_scalar": -7}, "query_pre_attn_scalar is -7"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters has"),
        ("gpt_neo", {"attention_types": [[["global"], 10**12]]}, "attention_types is"),
        ("gpt_neo", {"attention_types": 7}, "attention_types is 7"),
        ("gpt_neo", {"attention_types": [[["sideways"], 3]]}, "attention_types is"),
        ("gpt_neo", {"attention_layers": ["local"] * 3}, "attention_layers is"),
        ("gptj", {"tie_word_embeddings": True}, "head_bias needs head='untied'"),
        ("gptj", {"rotary_dim": 7}, "not 7; give an even rope_dim"),
        # Transformers turns whole heads here, whatever the file says.
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0",
        ),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*, expected a number above 0"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is 1000"),
        ("mistral", {"sliding_window": 10**30}, "sliding_window is 1000"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window is 'no', expected true or fal"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers is -1"),
        ("gemma2", {"sliding_window_size": 8}, "sliding_window_size is 8, elsewhere it is 5"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gpt_neo", {"attention_types": [[[], 10**30]]}, "attention_types is"),
        ("gpt_neo", {"window_size": None}, "window_size is null"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False, only True"),
        ("opt", {"word_embed_proj_dim": 11}, "word_embed_proj_dim is 11, only 24"),
        ("qwen2", {"use_mrope": True}, "use_mrope is True, only False"),
        ("smollm3", {"no_rope_layers": [1, 2, 1]}, "no_rope_layers is"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": -1}, "_interval is -1"),
    ],
)
def test_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        from_hf(FAMILIES[model_type], config_of(model_type, **changes), "config.json")


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_partial_rope_is_not_written_where_transformers_ignores_it(name: str) -> None:
    config = from_hf(FAMILIES[name], config_of(name), "")
    position = eqx_gpt.PositionConfig("rope", rope_dim=2)
    _, reasons = closest(FAMILIES[name], dataclasses.replace(config, position=position))
    assert any("partial_rotary_factor" in reason for reason in reasons)


def test_windows_from_the_first_layer_on() -> None:
    hf = config_of("qwen2", max_window_layers=0, layer_types=None)
    config = from_hf(FAMILIES["qwen2"], hf, "")
    assert config.layers == (eqx_gpt.LayerConfig(hf["sliding_window"]),)
    assert from_hf(FAMILIES["qwen2"], to_hf(FAMILIES["qwen2"], config), "") == config


def test_null_switches_off_what_is_on_by_default() -> None:
    """And is not the same as saying nothing."""
    off = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    hf = {k: v for k, v in config_of("gemma2").items() if k not in off}
    absent, null = (from_hf(FAMILIES["gemma2"], {**hf, **x}, "") for x in ({}, off))
    assert (absent.attention.softcap, absent.logit_softcap) == (50.0, 30.0)
    assert (null.attention.softcap, null.logit_softcap) == (None, None)
    hf = config_of("mistral", sliding_window=None)
    assert from_hf(FAMILIES["mistral"], hf, "").layers == (eqx_gpt.LayerConfig(),)
    hf.pop("sliding_window")
    assert from_hf(FAMILIES["mistral"], hf, "").layers == (eqx_gpt.LayerConfig(4096),)


def test_family_without_added_biases_comes_first() -> None:
    """Llama could hold a Qwen 2 with a zero bias more; its own family holds it as it is."""
    config = from_hf(FAMILIES["qwen2"], config_of("qwen2", use_sliding_window=False), "")
    assert family_for(config)[0].model_type == "qwen2"


def test_model_type_may_be_chosen_where_several_hold_the_model(tmp_path: Path) -> None:
    config = from_hf(FAMILIES["mistral"], config_of("mistral", sliding_window=None), "")
    assert family_for(config)[0].model_type == "llama"
    model = GPT.init(config, key=jax.random.key(0))
    save_pretrained(model, tmp_path, model_type="mistral")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mistral"
    assert from_pretrained(tmp_path).config == config
    with pytest.raises(
        WeightsError, match=r"a gpt2 of transformers is not this model: .*position\.kind"
    ):
        save_pretrained(model, tmp_path, model_type="gpt2")
    with pytest.raises(WeightsError, match="unknown model_type 'mistrall'; did you mean 'mistral'"):
        save_pretrained(model, tmp_path, model_type="mistrall")
