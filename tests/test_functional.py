"""GPT-2 on one page, against the module and on its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_gpt
from eqx_gpt import functional
from weights import from_pretrained

CONFIG = hf_files.GPT2_CONFIG
WITH_BPE = CONFIG | {"vocab_size": 50257, "n_embd": 5}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return hf_files.write_model(path, CONFIG, hf_files.gpt2_tensors(CONFIG))


@pytest.fixture(scope="module")
def with_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe")
    return hf_files.write_model(path, WITH_BPE, hf_files.gpt2_tensors(WITH_BPE, "transformer."))


def test_both_spellings_of_the_keys(directory: Path, tmp_path: Path) -> None:
    prefixed = hf_files.write_model(tmp_path, CONFIG, hf_files.gpt2_tensors(CONFIG, "transformer."))
    (bare, _), (stripped, _) = functional.load("", directory), functional.load("", prefixed)
    assert bare.keys() == stripped.keys()
    assert all(np.array_equal(bare[key], stripped[key]) for key in bare)


def test_greedy_equals_the_module_beyond_the_window(directory: Path) -> None:
    """Up to 13 tokens each program sees the whole sequence, then the last 13."""
    p, n_head = functional.load("", directory)
    model = from_pretrained(directory)
    for prompt in ([7, 3, 70], list(range(20))):
        found = functional.generate(p, prompt, 15, n_head, temperature=0.0)
        expected = eqx_gpt.generate(model, jnp.asarray(prompt), 15, temperature=0.0)
        assert [*prompt, *found] == np.asarray(expected).tolist()


def test_one_program_serves_all_steps(directory: Path) -> None:
    p, n_head = functional.load("", directory)
    before = functional.sample._cache_size()
    functional.generate(p, [5], 6, n_head, top_k=3)
    assert functional.sample._cache_size() == before + 1


def test_causal(directory: Path, getkey: Callable[[], jax.Array]) -> None:
    """No logit depends on a later token: the gradient with respect to it is zero."""
    p, n_head = functional.load("", directory)
    base = functional.gpt2(p, jnp.arange(10), n_head)
    changed = functional.gpt2(p, jnp.arange(10).at[6].set(70), n_head)
    assert np.array_equal(base[:6], changed[:6])
    assert not np.allclose(base[6:], changed[6:])


def test_samples_follow_the_seed_and_top_k(directory: Path) -> None:
    p, n_head = functional.load("", directory)
    settings: dict[str, Any] = {"temperature": 5.0, "top_k": None}
    first = functional.generate(p, [1], 12, n_head, seed=1, **settings)
    assert functional.generate(p, [1], 12, n_head, seed=1, **settings) == first
    assert functional.generate(p, [1], 12, n_head, seed=2, **settings) != first
    greedy = functional.generate(p, [1], 12, n_head, temperature=0.0)
    assert functional.generate(p, [1], 12, n_head, temperature=5.0, top_k=1) == greedy
    assert first != greedy


def test_main(with_bpe: Path) -> None:
    text = functional.main("Alan Turing", 4, model_dir=with_bpe, temperature=0.0)
    assert isinstance(text, str)
    assert text
    assert functional.main("Alan Turing", 0, model_dir=with_bpe) == ""
    again = functional.main("", n_tokens_to_generate=2, model_dir=str(with_bpe), seed=3)
    assert again == functional.main("", n_tokens_to_generate=2, model_dir=str(with_bpe), seed=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu', this page computes"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ],
)
def test_other_models_are_refused(
    changes: dict[str, Any], message: str, directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError, match=message):
        functional.main("x", model_dir=tmp_path)


def test_clear_errors(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_size is '345M', expected one of 124M, 355M"):
        functional.main("x", model_size="345M")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        functional.main("x", model_dir=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"model\.safetensors does not exist"):
        functional.main("x", model_dir=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match="damaged or cut short"):
        functional.main("x", model_dir=tmp_path)
    with pytest.raises(ValueError, match="temperature must be 0"):
        functional.main("x", model_dir=directory, temperature=-1.0)
