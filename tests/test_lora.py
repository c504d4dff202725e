"""Low-rank adapters: what they compute and learn, and their files, written here without PEFT."""

import json
import math

import equinox as eqx
import hf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, lively, random_tokens
from safetensors.numpy import load_file, save_file

import eqx_gpt
from eqx_gpt import LoRAConfig, lora
from eqx_gpt.tree import named_arrays
from train.config import TrainConfig
from train.loss import next_token_loss
from train.optimizer import make_optimizer, trainable
from train.step import Recipe, TrainState, train_step
from weights import (
    WeightsError,
    from_pretrained,
    load_adapter,
    save_adapter,
    save_gguf,
    save_pretrained,
)  # fmt: skip

CONFIG = LoRAConfig(rank=3, alpha=7.0, targets="blocks.attention.*,blocks.mlp.down")
NAMES = ["blocks.attention.qkv", "blocks.attention.out", "blocks.mlp.down"]


def adapted(name="gpt2", config=CONFIG):
    """A model whose adapters change it: their `b` is no longer zero."""
    model = lora.init(lively(ARCHITECTURES[name]), config, key=jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 20))
    return jax.tree.map(
        lambda learns, x: x + 0.3 * jax.random.normal(next(keys), x.shape) if learns else x,
        lora.trainable(model),
        model,
    )


def difference(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def test_new_adapters_change_nothing():
    plain = lively(ARCHITECTURES["gpt2"])
    model = lora.init(plain, CONFIG, key=jax.random.key(1))
    tokens = random_tokens(plain.config, 3, 7)
    np.testing.assert_array_equal(model(tokens), plain(tokens))
    assert list(lora.adapters(model)) == NAMES
    n_layer, n_out, n_in = plain.blocks.attention.qkv.weight.shape
    qkv = model.blocks.attention.qkv.lora
    assert (qkv.a.shape, qkv.b.shape) == ((n_layer, 3, n_in), (n_layer, n_out, 3))
    assert qkv.scale == 7 / 3
    assert len(np.unique(qkv.a)) == qkv.a.size  # no two layers alike
    assert abs(np.abs(qkv.a).max() * math.sqrt(n_in) - 1) < 0.1
    np.testing.assert_array_equal(lora.detach(model)(tokens), plain(tokens))


def test_adapters_and_their_merge_against_float64():
    model = adapted("llama")
    arrays = {k: np.asarray(x, np.float64) for k, x in named_arrays(lora.detach(model)).items()}
    for path, low_rank in lora.adapters(model).items():
        a, b = np.asarray(low_rank.a, np.float64), np.asarray(low_rank.b, np.float64)
        arrays[f"{path}.weight"] = arrays[f"{path}.weight"] + 7 / 3 * b @ a
    tokens = random_tokens(model.config, 3, 7)
    expected = np.stack([reference.gpt(model.config, arrays, row) for row in tokens])
    assert difference(model(tokens), expected) <= 2e-5
    merged = lora.merge(model)
    assert difference(merged(tokens), expected) <= 2e-5
    assert not lora.adapters(merged)
    assert difference(lora.detach(model)(tokens), expected) > 0.01
    assert jax.tree.structure(merged) == jax.tree.structure(lively(ARCHITECTURES["llama"]))


def test_an_adapted_model_decodes_and_is_laid_out():
    model = adapted("llama")
    tokens = random_tokens(model.config, 2, 4)
    found = eqx_gpt.generate(model, tokens, 5, temperature=0.0)
    expected = eqx_gpt.generate(lora.merge(model), tokens, 5, temperature=0.0)
    np.testing.assert_array_equal(found, expected)
    fast, merged = eqx_gpt.for_inference(model), eqx_gpt.for_inference(lora.merge(model))
    jax.tree.map(np.testing.assert_array_equal, fast, merged)


def test_another_config_and_shorter_sequences_keep_the_adapters():
    model = adapted()
    tokens = random_tokens(model.config, 5)
    short = model.crop_block_size(5)
    assert short.wpe.weight.shape[0] == short.config.block_size == 5
    np.testing.assert_array_equal(short(tokens), model(tokens))
    with pytest.raises(ValueError, match="block_size=14 exceeds the 13"):
        model.crop_block_size(14)


def test_what_cannot_be_adapted_is_refused():
    model = lively(ARCHITECTURES["gpt2"])
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"no name fits 'q_proj'; there are blocks\.attention"):
        lora.init(model, LoRAConfig(targets="blocks.mlp.*, q_proj"), key=key)
    with pytest.raises(ValueError, match="adapters already"):
        lora.init(adapted(), CONFIG, key=key)
    with pytest.raises(ValueError, match="laid out for decoding"):
        lora.init(eqx_gpt.for_inference(model), CONFIG, key=key)
    with pytest.raises(KeyError, match="head"):
        lora.attach(model, {"head": lora.adapters(adapted())[NAMES[0]]})
    with pytest.raises(ValueError, match="rank must be a whole number above 0, got 0"):
        LoRAConfig(rank=0)


def test_only_the_adapters_learn():
    model = lora.init(lively(ARCHITECTURES["gpt2"]), CONFIG, key=jax.random.key(1))
    config = TrainConfig(learning_rate=1e-2, decay_lr=False, lora_rank=3)
    optimizer = make_optimizer(config)
    state = TrainState.init(model, optimizer, trainable(config, model))
    factors = {f"{name}.lora.{factor}" for name in NAMES for factor in "ab"}
    assert named_arrays(state.params).keys() == factors
    moments = {name.partition(".mu.")[2] for name in named_arrays(state.opt_state)} - {""}
    assert moments == factors
    frozen = {name: np.asarray(x) for name, x in named_arrays(state.frozen).items()}
    assert frozen.keys() == named_arrays(lora.detach(model)).keys()
    windows = jnp.asarray(random_tokens(model.config, 1, 5, 9))
    start = float(next_token_loss(model, windows[0]))
    recipe = Recipe(optimizer, jnp.dtype(jnp.float32), jax.random.key(0))
    for _ in range(40):
        state, metrics = train_step((recipe, windows), state)
    assert float(metrics.loss) < start - 0.5
    for name, x in named_arrays(state.frozen).items():
        np.testing.assert_array_equal(x, frozen[name], err_msg=name)


def test_gradients_of_adapters_are_those_of_the_weight():
    """Of a change s b a: with respect to b, s times that of the weight by a's transpose."""
    model = adapted()
    batch = jnp.asarray(random_tokens(model.config, 5, 9))
    grads = eqx.filter_grad(next_token_loss)(model, batch).blocks.mlp.down.lora
    of_weight = eqx.filter_grad(next_token_loss)(lora.merge(model), batch).blocks.mlp.down.weight
    low_rank, of_weight = model.blocks.mlp.down.lora, np.asarray(of_weight, np.float64)
    scale, a, b = low_rank.scale, np.asarray(low_rank.a), np.asarray(low_rank.b)
    assert difference(grads.b, scale * of_weight @ a.swapaxes(1, 2)) <= 1e-5
    assert difference(grads.a, scale * b.swapaxes(1, 2) @ of_weight) <= 1e-5


def test_a_step_holds_no_gradient_or_moment_of_frozen_weights():
    """By the memory of the compiled step, in which the model outweighs everything else."""
    shape = eqx_gpt.GPTConfig(
        n_layer=1, n_head=2, n_embd=256, block_size=8, vocab_size=997
    )  # fmt: skip
    windows = jnp.zeros((1, 1, 9), jnp.int32)
    bytes_of = {}
    for rank in (0, 2):
        config = TrainConfig(lora_rank=rank, init_from="gpt2")

        def new(config=config):
            model = eqx_gpt.GPT.init(shape, key=jax.random.key(0))
            if config.lora is not None:
                model = lora.init(model, config.lora, key=jax.random.key(1))
            return TrainState.init(model, make_optimizer(config), trainable(config, model))

        recipe = Recipe(make_optimizer(config), jnp.dtype(jnp.float32), jax.random.key(0))
        lowered = train_step.lower((recipe, windows), new())
        memory = lowered.compile().memory_analysis()
        bytes_of[rank] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    model_bytes = 4 * eqx_gpt.count_params(eqx_gpt.GPT.init(shape, key=jax.random.key(0)))
    (whole, whole_temp), (low_rank, low_rank_temp) = bytes_of[0], bytes_of[2]
    assert whole >= 3 * model_bytes
    assert low_rank < 1.1 * model_bytes
    assert low_rank_temp < whole_temp - 0.9 * model_bytes


# Files


def write_adapter(directory, tensors, **config):
    directory.mkdir()
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["c_attn"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def factors(module, n_in, n_out, rank=2):
    random = np.random.default_rng(n_out)
    shapes = {"lora_A": (rank, n_in), "lora_B": (n_out, rank)}
    key = f"base_model.model.{module}"
    return {
        f"{key}.{name}.weight": random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture
def base(tmp_path):
    tensors = hf_files.gpt2_tensors(hf_files.GPT2_CONFIG, "transformer.")
    return hf_files.write_model(tmp_path / "base", hf_files.GPT2_CONFIG, tensors)


def test_a_directory_of_adapters_is_a_model(base, tmp_path):
    """Of one layer, and with a rank and a scale of their own in another."""
    tensors = {
        **factors("transformer.h.0.attn.c_attn", 10, 30),
        **factors("transformer.h.2.mlp.c_fc", 10, 40),
        **factors("transformer.h.1.mlp.c_fc", 10, 40, rank=4),
    }
    directory = write_adapter(
        tmp_path / "adapter", tensors, base_model_name_or_path=str(base), use_rslora=True,
        lora_dropout=0.1, fan_in_fan_out=True,
        rank_pattern={"h.1.mlp.c_fc": 4}, alpha_pattern={r"h\.1\..*": 5},
    )  # fmt: skip
    plain = from_pretrained(base)
    arrays = {k: np.array(x, np.float64) for k, x in named_arrays(plain).items()}
    for leaf, module, scale in (
        ("attention.qkv", "h.0.attn.c_attn", 6 / math.sqrt(2)),
        ("mlp.up", "h.2.mlp.c_fc", 6 / math.sqrt(2)),
        ("mlp.up", "h.1.mlp.c_fc", 5 / 2),
    ):
        a, b = (tensors[f"base_model.model.transformer.{module}.lora_{x}.weight"] for x in "AB")
        arrays[f"blocks.{leaf}.weight"][int(module[2])] += scale * b.astype(np.float64) @ a
    tokens = random_tokens(plain.config, 7)
    expected = reference.gpt(plain.config, arrays, tokens)
    assert difference(from_pretrained(directory)(tokens), expected) <= 2e-5
    model = load_adapter(plain, directory)
    assert difference(model(tokens), expected) <= 2e-5
    assert from_pretrained(directory, dtype="bfloat16").wte.weight.dtype == jnp.bfloat16
    save_adapter(model, tmp_path / "again", base=str(base))
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    for key in tensors:
        assert again[key].shape == tensors[key].shape
    assert difference(from_pretrained(tmp_path / "again")(tokens), expected) <= 2e-5


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({}, {}, "holds no adapter"),
        (factors("transformer.h.0.attn.c_attn", 10, 30), {"use_dora": True}, "use_dora is True"),
        (factors("transformer.h.0.attn.c_attn", 10, 30), {"r": 3}, "expected rank r = 3"),
        (factors("transformer.h.0.mlp.c_fc", 10, 40), {"lora_alpha": None}, "lora_alpha is None"),
        (factors("transformer.h.0.attn.c_attn", 11, 30), {}, r"lora_A has shape \(2, 11\)"),
        (factors("transformer.h.0.attn.c_attn", 10, 31), {}, r"lora_B has shape \(31, 2\)"),
        (factors("transformer.h.9.attn.c_attn", 10, 30), {}, "h.9.attn.c_attn is no linear map"),
        (factors("lm_head", 10, 71), {}, "lm_head is no linear map of a block"),
        (factors("x", 10, 30), {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (factors("x", 10, 30), {"init_lora_weights": "pissa"}, "changes the model's own weights"),
        (factors("x", 10, 30), {"bias": "all"}, "bias is 'all'"),
        (factors("x", 10, 30), {"news": 7}, "news is 7, which is not understood"),
        ({"base_model.model.x.lora_magnitude_vector": np.ones(3)}, {}, "no factor of a linear map"),
        ({"base_model.model.x.lora_A.weight": np.ones((2, 3), np.float32)}, {}, "has no lora_B"),
    ],
)  # fmt: skip
def test_adapters_that_are_not_understood(tensors, config, words, base, tmp_path):
    directory = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(WeightsError, match=words):
        load_adapter(from_pretrained(base), directory)


def test_an_adapter_that_does_not_say_for_what(tmp_path):
    tensors = factors("transformer.h.0.attn.c_attn", 10, 30)
    directory = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(WeightsError, match="base_model_name_or_path is None, expected the model"):
        from_pretrained(directory)


def test_saving_refuses(base, tmp_path):
    model = adapted()
    for save in (save_pretrained, save_gguf):
        with pytest.raises(WeightsError, match=r"low-rank adapters; save eqx_gpt\.lora\.merge"):
            save(model, tmp_path / "model")
    with pytest.raises(WeightsError, match="has no low-rank adapters"):
        save_adapter(lora.merge(model), tmp_path / "adapter")
    with pytest.raises(WeightsError, match=r"holds .* which is no file of an adapter"):
        save_adapter(model, base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
