"""Tiny random models of transformers, and what they compute, for the tests beside this file."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

import eqx_gpt
from weights import from_pretrained, save_pretrained
from weights.families import family_for
from weights.save import tensors_of

BATCH = 3


def random_model(config: transformers.PretrainedConfig) -> Any:
    """Every weight is random, biases and norms included, and large enough to matter."""
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = "norm" in name or "ln_" in name
            around_one = norm and "weight" in name and "gemma" not in config.model_type
            # Large embeddings and biases favour one token everywhere.
            small = "wte" in name or "embed" in name or "bias" in name or norm
            mean, std = float(around_one), 0.1 if small else 0.4
            weight.normal_(mean, std, generator=generator)
    return model


def tokens_of(seq: int, vocab_size: int, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seq).integers(0, vocab_size, (batch, seq))


@contextmanager
def no_warning() -> Iterator[None]:
    """AssertionError if anything is logged at the level of a warning."""
    logged: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    handler = Collect(logging.WARNING)
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not logged


def load_without_warning(directory: Path) -> Any:
    with no_warning():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, dtype="auto"
        )
    assert not any(info.values()), info
    return model.eval()


def check_logits(model: eqx_gpt.GPT, hf: Any, seq: int) -> None:
    tokens = tokens_of(seq, hf.config.vocab_size)
    with torch.no_grad():
        expected = hf(torch.from_numpy(tokens)).logits.numpy()
    found = np.asarray(model(tokens))[..., : expected.shape[-1]]
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"logits, seq {seq}: {difference:.1e} of the largest")
    assert difference <= 2e-5


def check_all(name: str, ours: Iterable[Any], theirs: Iterable[torch.Tensor]) -> None:
    """Layer by layer, relative to the largest number of each."""
    for found, tensor in zip(ours, theirs, strict=True):
        expected = tensor.numpy()
        assert found.shape == expected.shape
        difference = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
        print(f"{name}: {difference:.1e} of the largest")
        assert difference <= 2e-5


def check_greedy(model: eqx_gpt.GPT, hf: Any) -> None:
    tokens = tokens_of(5, hf.config.vocab_size)
    mask = torch.ones(tokens.shape, dtype=torch.int64)
    expected = hf.generate(
        torch.from_numpy(tokens), attention_mask=mask, do_sample=False, max_new_tokens=32
    )
    found = eqx_gpt.generate(model, tokens.astype(np.int32), 32, temperature=0.0)
    assert np.array_equal(np.asarray(found), expected.numpy())
    assert len(np.unique(expected.numpy()[:, 5:])) > 3  # otherwise it would prove little


def check_gradients(model: eqx_gpt.GPT, hf: Any, seq: int) -> None:
    """Of the mean cross-entropy of the next token, in every weight, relative to its norm."""
    tokens = tokens_of(seq, hf.config.vocab_size)

    def loss(model: eqx_gpt.GPT) -> jax.Array:
        log_p = jax.nn.log_softmax(model(tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(tokens)[:, 1:, None], axis=-1))

    gradients = to_keys(eqx.filter_grad(loss)(model))
    logits = hf(torch.from_numpy(tokens)).logits[:, :-1]
    target = torch.from_numpy(tokens)[:, 1:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    expected = {name: weight.grad.numpy() for name, weight in hf.named_parameters()}
    assert gradients.keys() == expected.keys()
    norms = {name: np.linalg.norm(gradient) for name, gradient in expected.items()}
    # A bias of the keys moves all scores of a query alike, and the softmax not at all.
    zero = 1e-6 * max(norms.values())
    errors = {
        name: np.linalg.norm(gradients[name] - expected[name]) / norms[name]
        if norms[name] > zero
        else float(np.linalg.norm(gradients[name]) > zero)
        for name in expected
    }
    worst = max(errors, key=lambda name: errors[name])
    print(f"gradients: {errors[worst]:.1e} in {worst}")
    assert errors[worst] <= 1e-4


def to_keys(model: eqx_gpt.GPT) -> dict[str, np.ndarray]:
    """The arrays of a model by the names of transformers' parameters."""
    family, config = family_for(model.config)
    key_map = family.key_map(config)
    found = tensors_of(model, config, key_map, "float32")
    renamed = {key_map.head: "lm_head.weight"}  # as the module is called, whatever the file says
    return {renamed.get(key, key): view.reshape(shape) for key, (view, shape) in found.items()}


def load_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def check_round_trip(hf: Any, directory: Path, dtype: str) -> None:
    """HF -> ours -> HF gives the same tensors, bit for bit, whatever their dtype."""
    theirs, ours = directory / "theirs", directory / "ours"
    copy.deepcopy(hf).to(getattr(torch, dtype)).save_pretrained(theirs)
    save_pretrained(from_pretrained(theirs, dtype=dtype), ours)  # pyright: ignore[reportArgumentType]
    before, after = load_tensors(theirs), load_tensors(ours)
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype == jnp.dtype(dtype)
        assert before[key].tobytes() == after[key].tobytes(), key


def check_config_round_trip(hf: Any, loaded: Any, ignored: Mapping[str, Any]) -> None:
    """The config that transformers reads back differs in nothing but `ignored`."""
    before, after = hf.config.to_dict(), loaded.config.to_dict()
    different = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    different -= {"_name_or_path", "transformers_version", *ignored}
    assert not different, {k: (before.get(k), after.get(k)) for k in different}
