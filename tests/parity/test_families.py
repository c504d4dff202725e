"""Every family against transformers, in float32, on tiny random models."""

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import transformers
from cases import BLOCK, CASES, hf_config
from make_fixtures import FIXTURES, expected
from safetensors.numpy import load_file

from eqx_gpt import inspect
from weights import from_pretrained, save_pretrained
from weights.families import FAMILIES

# What transformers keeps beside what it means, or writes in several ways.
SAME_MEANING = {
    "attention_types",
    "max_window_layers",
    "no_rope_layer_interval",
    "use_bidirectional_attention",
    "_sliding_window_pattern",
}
DROPOUT = {name: None for family in FAMILIES.values() for name in family.dropout}


@pytest.fixture(
    scope="module",
    params=[(model_type, case) for model_type, cases in CASES.items() for case in cases],
    ids=lambda case: f"{case[0]}: {case[1]}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of transformers, the directory that it saved, and ours from there."""
    hf = oracle.random_model(hf_config(*request.param))
    directory = tmp_path_factory.mktemp("theirs")
    hf.save_pretrained(directory, max_shard_size=20_000)
    return hf, directory, from_pretrained(directory)


def test_every_family_has_cases() -> None:
    assert CASES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("seq", [1, 7, BLOCK])
def test_logits(case: Any, seq: int) -> None:
    hf, _, model = case
    oracle.check_logits(model, hf, seq)


def test_hidden_states_and_attentions(case: Any) -> None:
    """The stream before each block, the last one after the last norm, and all weights."""
    hf, _, model = case
    tokens = oracle.tokens_of(11, hf.config.vocab_size)
    usual = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = hf(torch.from_numpy(tokens), output_hidden_states=True, output_attentions=True)
    hf.set_attn_implementation(usual)
    weights = "blocks.*.attention.weights"
    _, ours = inspect.run(model, tokens, capture=("blocks.*.input", "norm", weights))
    oracle.check_all("hidden states", [*ours["blocks.*.input"], ours["norm"]], theirs.hidden_states)
    oracle.check_all("attentions", ours[weights], theirs.attentions)


def test_greedy_with_cache(case: Any) -> None:
    hf, _, model = case
    oracle.check_greedy(model, hf)


def test_gradients(case: Any) -> None:
    hf, _, model = case
    oracle.check_gradients(model, hf, 11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(case: Any, dtype: str, tmp_path: Path) -> None:
    hf, _, _ = case
    oracle.check_round_trip(hf, tmp_path, dtype)


def test_saved_model_loads_without_warning(case: Any, tmp_path: Path) -> None:
    hf, _, model = case
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = oracle.load_without_warning(tmp_path)
    if loaded.config.model_type == hf.config.model_type:
        oracle.check_config_round_trip(hf, loaded, {**DROPOUT, **dict.fromkeys(SAME_MEANING)})
    tokens = torch.from_numpy(oracle.tokens_of(11, hf.config.vocab_size))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, hf(tokens).logits)
    for name, weight in hf.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fixture_is_what_transformers_computes(model_type: str) -> None:
    """The tests without torch stand on it."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / model_type, dtype=torch.float32
    )
    recorded, found = load_file(FIXTURES / model_type / "expected.safetensors"), expected(hf.eval())
    assert recorded.keys() == found.keys()
    largest = np.abs(found["logits"]).max()
    assert np.abs(recorded["logits"] - found["logits"]).max() <= 1e-6 * largest
    assert np.array_equal(recorded["tokens"], found["tokens"])
    assert np.array_equal(recorded["continued"], found["continued"])
