"""What only GPT-2 has, against transformers in float32."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import transformers
from cases import hf_config

import eqx_gpt
from eqx_gpt import functional
from eqx_gpt.config import AttentionConfig, GPTConfig, MLPConfig, NormConfig
from eqx_gpt.tokenizer import GPT2Tokenizer
from weights import from_pretrained, load_tokenizer, save_pretrained


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of transformers, and the directory that it saved."""
    hf = oracle.random_model(hf_config("gpt2", "as published"))
    directory = tmp_path_factory.mktemp("gpt2")
    hf.save_pretrained(directory)
    return hf, directory


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
