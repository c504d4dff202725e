"""Llama against transformers, in float32."""

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers

from weights import from_pretrained, save_pretrained

SHAPE = {
    "vocab_size": 71,
    "max_position_embeddings": 43,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "one key-value head, tied": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "multi-head, biases, wide heads, theta": {
        "num_attention_heads": 3,
        "head_dim": 10,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "rms_norm_eps": 1e-2,
    },
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of transformers, and the directory that it saved."""
    config = transformers.LlamaConfig(**SHAPE, **CASES[request.param], **oracle.NO_TOKENS)
    hf = oracle.random_model(config)
    directory = tmp_path_factory.mktemp("llama")
    hf.save_pretrained(directory, max_shard_size=20_000)
    return hf, directory


@pytest.mark.parametrize("seq", [1, 7, 43])
def test_logits(case: Any, seq: int) -> None:
    hf, directory = case
    oracle.check_logits(from_pretrained(directory), hf, seq)


def test_greedy_with_cache(case: Any) -> None:
    hf, directory = case
    oracle.check_greedy(from_pretrained(directory), hf)


def test_gradients(case: Any) -> None:
    hf, directory = case
    oracle.check_gradients(from_pretrained(directory), hf, 11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(case: Any, dtype: str, tmp_path: Path) -> None:
    hf, _ = case
    oracle.check_round_trip(hf, tmp_path, dtype)


def test_saved_model_loads_without_warning(case: Any, tmp_path: Path) -> None:
    hf, directory = case
    save_pretrained(from_pretrained(directory), tmp_path / "ours")
    loaded = oracle.load_without_warning(tmp_path / "ours")
    oracle.check_config_round_trip(hf, loaded, {})
    for name, weight in hf.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
