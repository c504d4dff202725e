"""Samplers against transformers' logits processors, and prompts against its tokenizers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_text import bytes_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eqx_gpt.sampling import Sampler
from eqx_gpt.text import prompt_ids

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 0.7},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 0.6, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_samplers_are_those_of_transformers(settings: dict[str, Any]) -> None:
    """What may be drawn is the same, and how likely; in the order of `generate` there."""
    batch, vocab = 53, 307
    rng = np.random.default_rng(1)
    logits = 3 * rng.standard_normal((batch, vocab)).astype(np.float32)
    before = rng.integers(0, vocab, (batch, 41))

    processors = LogitsProcessorList()
    if "repetition_penalty" in settings:
        processors.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(float(settings.get("temperature", 1.0))))
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        processors.append(MinPLogitsWarper(settings["min_p"]))
    # The type is a LongTensor by name only.
    expected = processors(torch.from_numpy(before), torch.from_numpy(logits)).numpy()  # pyright: ignore[reportArgumentType]

    sampler = Sampler.init(**{"temperature": 1.0, **settings})
    seen = np.zeros((batch, vocab), bool)
    np.put_along_axis(seen, before, True, axis=1)
    found = sampler.filtered(sampler.penalized(jnp.asarray(logits), jnp.asarray(seen)))
    found = np.asarray(found)
    assert np.array_equal(np.isfinite(found), np.isfinite(expected))
    kept = np.isfinite(expected)
    assert np.abs(found[kept] - expected[kept]).max() <= 1e-6 * np.abs(expected[kept]).max()


def test_prompts_begin_as_in_transformers() -> None:
    ours = bytes_tokenizer()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(ours.tokenizer_json), bos_token="<s>", eos_token="</s>"
    )
    for text in ("a", "", "a Grüße", "\n"):
        assert prompt_ids(ours, text) == theirs(text)["input_ids"], text
