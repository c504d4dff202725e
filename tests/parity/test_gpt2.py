"""GPT-2 against transformers, in float32."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import transformers

import eqx_gpt
from eqx_gpt import functional
from eqx_gpt.config import AttentionConfig, GPTConfig, MLPConfig, NormConfig
from eqx_gpt.tokenizer import GPT2Tokenizer
from weights import from_pretrained, load_tokenizer, save_pretrained

SHAPE = {"vocab_size": 71, "n_positions": 43, "n_embd": 28, "n_layer": 3, "n_head": 7}
CASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "exact gelu, narrow mlp": {"activation_function": "gelu", "n_inner": 37},
    "untied, large epsilon": {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-2},
    "relu": {"activation_function": "relu"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of transformers, and the directory that it saved."""
    config = transformers.GPT2Config(**SHAPE, **CASES[request.param], **oracle.NO_TOKENS)
    hf = oracle.random_model(config)
    directory = tmp_path_factory.mktemp("gpt2")
    hf.save_pretrained(directory)
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
    save_pretrained(from_pretrained(directory), tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    loaded = oracle.load_without_warning(tmp_path / "ours")
    oracle.check_config_round_trip(hf, loaded, {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0})
    for name, weight in hf.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


@pytest.mark.parametrize("case", ["as published"], indirect=True)
def test_model_without_its_head(case: Any, tmp_path: Path) -> None:
    """The hub's gpt2 was saved so: no prefix, and no lm_head."""
    hf, directory = case
    hf.transformer.save_pretrained(tmp_path)
    bare, whole = from_pretrained(tmp_path), from_pretrained(directory)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), bare, whole))


def test_padded_model_without_biases(getkey: Any, tmp_path: Path) -> None:
    """As the training presets make it; transformers computes the same from its export."""
    config = GPTConfig(
        block_size=43,
        vocab_size=80,
        n_token=71,
        n_layer=3,
        n_head=7,
        n_embd=28,
        norm=NormConfig(bias=False),
        attention=AttentionConfig(qkv_bias=False, out_bias=False),
        mlp=MLPConfig(bias=False),
    )
    model = eqx_gpt.GPT.init(config, key=getkey())
    model = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(getkey(), x.shape), model)
    save_pretrained(model, tmp_path)
    hf = oracle.load_without_warning(tmp_path)
    assert hf.config.vocab_size == 71
    oracle.check_logits(model, hf, 11)
    oracle.check_greedy(model, hf)


@pytest.mark.parametrize("case", ["as published"], indirect=True)
def test_functional(case: Any) -> None:
    hf, directory = case
    p, n_head = functional.load("124M", directory)
    tokens = oracle.tokens_of(11, 71, batch=1)
    with torch.no_grad():
        expected = hf(torch.from_numpy(tokens)).logits.numpy()[0]
    found = functional.gpt2(p, jnp.asarray(tokens[0], jnp.int32), n_head)
    assert np.abs(np.asarray(found) - expected).max() <= 2e-5 * np.abs(expected).max()
    greedy = hf.generate(
        torch.from_numpy(tokens),
        attention_mask=torch.ones(tokens.shape, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=20,
    )
    new = functional.generate(p, tokens[0].tolist(), 20, n_head, temperature=0.0)
    assert new == greedy[0, 11:].tolist()


HARD_TEXT = "It's 3 o'clock…  \n\n\t naïve 漢字 🤖🏽 'LL x\u0000y <|endoftext|> end  "


def test_saved_tokenizer_is_gpt2s(getkey: Any, tmp_path: Path) -> None:
    config = GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=2)
    save_pretrained(eqx_gpt.GPT.init(config, key=getkey()), tmp_path, tokenizer=GPT2Tokenizer())
    with oracle.no_warning():
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GPT2Tokenizer"
    assert (len(theirs), theirs.eos_token_id, theirs.model_max_length) == (50257, 50256, 8)
    expected = GPT2Tokenizer().encode(HARD_TEXT, special="token")
    assert theirs(HARD_TEXT)["input_ids"] == expected
    assert theirs.decode(expected) == HARD_TEXT
    assert load_tokenizer(tmp_path).encode(HARD_TEXT, special="token") == expected
    hf = oracle.load_without_warning(tmp_path)
    assert hf.generation_config.eos_token_id == 50256


def test_tokenizer_that_transformers_saved(tmp_path: Path) -> None:
    config = GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=2)
    model = eqx_gpt.GPT.init(config, key=jax.random.key(0))
    save_pretrained(model, tmp_path / "ours", tokenizer=GPT2Tokenizer())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/config.json").write_text((tmp_path / "ours/config.json").read_text())
    found = load_tokenizer(tmp_path / "theirs")
    assert found.end_of_text == 50256
    assert found.encode(HARD_TEXT, special="token") == theirs(HARD_TEXT)["input_ids"]
