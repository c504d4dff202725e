"""Runs that train low-rank adapters, or some of the weights: what learns, what lies on disk."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from architectures import lively
from test_loop import interrupted
from tiny_run import FLAGS, command, losses, make_dataset, run

from eqx_gpt import GPTConfig, lora
from eqx_gpt.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from eqx_gpt.tree import named_arrays
from train.config import TrainConfig
from train.loop import train as run_training
from train.manifest import DatasetError, Manifest
from train.presets import get_preset
from train.resolve import Wishes, open_data
from train.run import run_config
from weights import from_pretrained, save_pretrained

START = GPTConfig(
    block_size=17, vocab_size=40, n_layer=2, n_head=2, n_embd=14, head="untied",
    norm=NormConfig("rmsnorm", bias=False), position=PositionConfig("rope"),
    attention=AttentionConfig(n_kv_head=1, head_dim=6, qkv_bias=False, out_bias=False),
    mlp=MLPConfig("gated", "silu", n_inner=11, bias=False),
)  # fmt: skip
LORA = {"lora_rank": 2, "lora_alpha": 5.0, "lora_targets": "blocks.attention.*,blocks.mlp.down"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(data_dir):
    return Manifest.read(data_dir / "tiny")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A pretrained model, as a directory, and as a model."""
    directory = tmp_path_factory.mktemp("models") / "start"
    save_pretrained(lively(START), directory)
    return directory, from_pretrained(directory)


@pytest.fixture(scope="module")
def config(data_dir, start):
    """In bfloat16, which the frozen weights are then kept in."""
    shape = ("n_layer", "n_head", "n_embd")  # which the model decides
    flags = {k: v for k, v in FLAGS.items() if k not in shape}
    flags |= {"max_iters": 20, "precision": "bfloat16", "sample_interval": 20}
    return TrainConfig(**flags, data_dir=str(data_dir), init_from=str(start[0]))


@pytest.fixture(scope="module")
def adapted(config, data, start, tmp_path_factory):
    """A run that trained adapters."""
    config = dataclasses.replace(config, **LORA)
    out_dir = tmp_path_factory.mktemp("runs") / "adapted"
    config = dataclasses.replace(config, out_dir=str(out_dir))
    run_training(config, data, pretrained=lambda: start[1])
    return config


def on_disk(path):
    metadata = ocp.StandardCheckpointHandler().metadata(path.resolve()).tree
    return {name: (x.shape, str(x.dtype)) for name, x in metadata.items()}


def test_a_run_of_adapters(adapted, start):
    out_dir, before = adapted.out_dir, named_arrays(start[1])
    found = losses(Path(out_dir))
    assert [i for kind, i in found if kind == "val_loss"] == [0, 10, 20]  # 0: of the weights given
    assert found["val_loss", 20] < found["val_loss", 10] - 0.1
    model = from_pretrained(out_dir, merge=False)
    assert list(lora.adapters(model)) == [
        "blocks.attention.qkv", "blocks.attention.out", "blocks.mlp.down",
    ]  # fmt: skip
    assert model.blocks.attention.qkv.lora.scale == 2.5
    assert float(abs(model.blocks.attention.qkv.lora.b).max()) > 1e-3
    for name, x in named_arrays(lora.detach(model)).items():
        # Not through the bfloat16 that the run computed in.
        np.testing.assert_array_equal(x, before[name], err_msg=name)
    tokens = np.arange(15)[None]
    expected, merged = np.asarray(model(tokens)), from_pretrained(out_dir)
    assert abs(np.asarray(merged(tokens)) - expected).max() <= 2e-5 * abs(expected).max()
    assert not lora.adapters(merged)
    assert from_pretrained(out_dir, merge=False, dtype="bfloat16").wte.weight.dtype == "bfloat16"
    assert merged.config.block_size == 17  # rotary positions lose nothing


def test_a_checkpoint_holds_the_adapters_alone(adapted, start):
    out_dir = Path(adapted.out_dir)
    stored = on_disk(out_dir / "checkpoints/20/model")
    assert len(stored) == 6
    assert all(".lora." in name and dtype == "float32" for name, (_, dtype) in stored.items())
    base = on_disk(out_dir / "base/0/model")
    assert base.keys() == named_arrays(start[1]).keys()
    assert {dtype for _, dtype in base.values()} == {"float32"}
    moments = [name for name in on_disk(out_dir / "checkpoints/20/optimizer") if ".mu." in name]
    assert len(moments) == 6
    content = json.loads((out_dir / "run.json").read_text())
    assert content["lora"] == {"rank": 2, "alpha": 5.0, "targets": LORA["lora_targets"]}


@pytest.mark.parametrize("looks", [0, 7, 13])
def test_a_run_of_adapters_goes_on_exactly(looks, adapted, data, start, tmp_path, monkeypatch):
    config = dataclasses.replace(adapted, out_dir=str(tmp_path / "run"))
    outcome = interrupted(monkeypatch, looks, config, data, pretrained=lambda: start[1])
    assert outcome.steps_done < 20
    config = run_config(tmp_path / "run")
    run_training(config, data, pretrained=lambda: start[1], resume=True)
    assert losses(tmp_path / "run") == losses(Path(adapted.out_dir))
    a, b = from_pretrained(tmp_path / "run"), from_pretrained(adapted.out_dir)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_frozen_parts_stay_as_they_are(config, data, start, tmp_path):
    config = dataclasses.replace(
        config, out_dir=str(tmp_path), freeze="wte.*, blocks.mlp.*", max_iters=5,
        always_save_checkpoint=False, eval_interval=2,
    )  # fmt: skip
    run_training(config, data, pretrained=lambda: start[1])
    before, after = named_arrays(start[1]), named_arrays(from_pretrained(tmp_path))
    same = {name for name in before if np.array_equal(before[name], after[name])}
    frozen = {"wte.weight", *(f"blocks.mlp.{x}.weight" for x in ("up", "gate", "down"))}
    assert same == frozen
    (best,) = (tmp_path / "best").iterdir()
    assert on_disk(best / "model").keys() == before.keys() - frozen
    assert on_disk(tmp_path / "base/0/model").keys() == frozen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_rank": 2, "init_from": "scratch"}, "lora_rank=2 adapts trained weights, and"),
        ({"lora_rank": 2, "freeze": "wte.*"}, r"freeze='wte\.\*' says nothing with lora_rank=2"),
        ({"lora_rank": 2, "lora_targets": "q_proj"}, "targets .*'q_proj'; there are blocks.a"),
        ({"freeze": "wte.*,wpe.*"}, r"freeze: no name fits 'wpe\.\*'; there are wte\.weight, b"),
        ({"freeze": "*"}, r"freeze='\*' fits every array; leave something to learn"),
        ({"block_size": 18}, "block_size=18 exceeds the 17"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, words, config, data, start, tmp_path):
    config = dataclasses.replace(config, out_dir=str(tmp_path / "run"), **change)
    with pytest.raises(ValueError, match=words):
        run_training(config, data, pretrained=lambda: start[1])
    assert not (tmp_path / "run").exists()


def test_a_dataset_in_a_models_tokens_is_asked_for(tmp_path):
    """Its preset cannot do with the standard library's source, which is in GPT-2's."""
    wishes = Wishes("finetune-shakespeare-lora", None, {})
    config = dataclasses.replace(get_preset(wishes.preset), data_dir=str(tmp_path))
    with pytest.raises(DatasetError, match="--name shakespeare_smollm2 --tokenizer smollm2-135m"):
        open_data(wishes, config)


def test_values_that_mean_nothing():
    with pytest.raises(ValueError, match="lora_rank must be 0 or above, got -1"):
        TrainConfig(lora_rank=-1)
    with pytest.raises(ValueError, match=r"lora_alpha must be above 0, got 0\.0"):
        TrainConfig(lora_alpha=0.0)


def test_the_commands_take_a_run_of_adapters(adapted, tmp_path):
    """Merged, and as adapters, which are a model as well."""
    out_dir = tmp_path / "run"
    shutil.copytree(adapted.out_dir, out_dir)
    done = run(command("sample.py", out_dir=out_dir, num_samples=1, max_new_tokens=9), tmp_path)
    assert done.returncode == 0, done.stderr
    for argv in (("run", "merged"), ("run", "alone", "--merge=False")):
        done = run(command("convert.py", *argv), tmp_path)
        assert done.returncode == 0, done.stderr
    tokens = np.arange(15)[None]
    expected = np.asarray(from_pretrained(out_dir)(tokens))
    for name in ("merged", "alone"):
        found = np.asarray(from_pretrained(tmp_path / name)(tokens))
        assert abs(found - expected).max() <= 2e-5 * abs(expected).max()
    config = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == adapted.init_from
    assert sorted(config["target_modules"]) == [
        "mlp.down_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj",
        "self_attn.v_proj",
    ]  # fmt: skip
