"""Loading and saving models: the Hugging Face layout on disk, and run directories."""

import dataclasses
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import hf_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import eqx_gpt
from eqx_gpt import GPT, for_inference, functional
from eqx_gpt.config import AttentionConfig, GPTConfig, MLPConfig, NormConfig, PositionConfig
from eqx_gpt.tokenizer import CharTokenizer, GPT2Tokenizer, JSONTokenizer
from eqx_gpt.tree import named_arrays
from weights import WeightsError, from_pretrained, load_tokenizer, save_gguf, save_pretrained
from weights.load import skeleton
from weights.run import run_checkpoint
from weights.tokenizer import gpt2_tokenizer_json, gpt2_vocab_and_merges

ROOT = Path(__file__).resolve().parent.parent
CONFIG = hf_files.GPT2_CONFIG
TENSORS = hf_files.gpt2_tensors(CONFIG, "transformer.")
SMALL = GPTConfig(block_size=13, vocab_size=71, n_layer=3, n_head=5, n_embd=10)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return hf_files.write_model(tmp_path / "hf", CONFIG, TENSORS)


def load_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def same_arrays(a: eqx_gpt.GPT, b: eqx_gpt.GPT) -> bool:
    return a.config == b.config and bool(eqx.tree_equal(a, b))


def random_model(config: GPTConfig) -> eqx_gpt.GPT:
    """Made by numpy, for `GPT.init` compiles."""
    model, random = skeleton(config, "float32"), np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), model)


def refusal_of(call: str) -> str:
    """The WeightsError of a call in another process, as a user meets it: annotations unchecked."""
    program = (
        f"import weights\ntry: weights.{call}\nexcept weights.WeightsError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


# Loading


def test_agrees_with_the_functional_gpt2(directory: Path) -> None:
    model = from_pretrained(directory)
    p, n_head = functional.load("124M", directory)
    tokens = jnp.arange(13, dtype=jnp.int32) * 5
    expected = functional.gpt2(p, tokens, n_head)
    np.testing.assert_allclose(model(tokens), expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def test_prefix_masks_and_tied_head_of_the_hubs_files(directory: Path, tmp_path: Path) -> None:
    tensors = hf_files.gpt2_tensors(CONFIG)
    tensors["lm_head.weight"] = tensors["wte.weight"].copy()
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = np.ones((1, 1, 13, 13), np.float32)
        tensors[f"h.{i}.attn.masked_bias"] = np.zeros((1,), np.float32)
    bare = hf_files.write_model(tmp_path / "bare", CONFIG, tensors)
    assert same_arrays(from_pretrained(bare), from_pretrained(directory))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_exact(dtype: Any, tmp_path: Path) -> None:
    tensors = {key: value.astype(jnp.dtype(dtype)) for key, value in TENSORS.items()}
    source = hf_files.write_model(tmp_path / "in", CONFIG, tensors)
    model = from_pretrained(source, dtype=dtype)
    assert model.wte.weight.dtype == jnp.dtype(dtype)
    assert model.norm.weight.dtype == jnp.float32
    save_pretrained(model, tmp_path / "out")
    found = load_tensors(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype
        assert found[key].tobytes() == value.tobytes(), key
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert from_pretrained(source, dtype="auto").wte.weight.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_heads_of_gpt_neox(dtype: Any, tmp_path: Path) -> None:
    config = hf_files.GPT_NEOX_CONFIG
    tensors = {k: v.astype(jnp.dtype(dtype)) for k, v in hf_files.gpt_neox_tensors(config).items()}
    model = from_pretrained(hf_files.write_model(tmp_path / "in", config, tensors), dtype=dtype)
    qkv = np.asarray(model.blocks.attention.qkv.weight)
    for layer in range(2):
        # 3 heads, each with 8 rows of q, 8 of k and 8 of v
        fused = tensors[f"gpt_neox.layers.{layer}.attention.query_key_value.weight"]
        for i, part in enumerate(np.split(qkv[layer], 3)):
            heads = [fused[24 * head + 8 * i :][:8] for head in range(3)]
            assert np.array_equal(part, np.concatenate(heads))
    save_pretrained(model, tmp_path / "out")
    found = load_tensors(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[key], value) for key, value in tensors.items())


def test_dtype_is_converted(tmp_path: Path) -> None:
    half = {key: value.astype(ml_dtypes.bfloat16) for key, value in TENSORS.items()}
    model = from_pretrained(hf_files.write_model(tmp_path, CONFIG, half))
    assert model.wte.weight.dtype == jnp.float32
    expected = half["transformer.wte.weight"].astype(np.float32)
    assert np.array_equal(np.asarray(model.wte.weight), expected)
    assert "dtype must be 'auto', 'float32'" in refusal_of("from_pretrained('x', dtype='int3')")


def test_shards(directory: Path, tmp_path: Path) -> None:
    sharded = hf_files.write_model(tmp_path / "sharded", CONFIG, TENSORS, shards=3)
    assert same_arrays(from_pretrained(sharded), from_pretrained(directory))


def test_tensors_are_read_in_pieces(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = from_pretrained(directory)
    monkeypatch.setattr("weights.tensors.CHUNK_BYTES", 150)
    assert same_arrays(from_pretrained(directory), whole)


def test_loaded_model_can_be_trained_in_place(directory: Path) -> None:
    """Its buffers are donated like any other's, though they were numpy's."""
    model = from_pretrained(directory)
    before = np.asarray(model.wte.weight).copy()

    @eqx.filter_jit(donate="all")
    def step(model: eqx_gpt.GPT) -> eqx_gpt.GPT:
        return jax.tree.map(lambda x: x + 1, model)

    assert np.array_equal(np.asarray(step(model).wte.weight), before + 1)


# Damaged input


def replace_tensors(directory: Path, **changes: np.ndarray | None) -> None:
    tensors = TENSORS | {f"transformer.{k.replace('__', '.')}": v for k, v in changes.items()}
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, directory / "model.safetensors")


def test_all_problems_of_a_file_are_named_at_once(directory: Path) -> None:
    replace_tensors(
        directory,
        wte__weight=np.zeros((70, 10), np.float32),
        h__1__ln_1__bias=None,
        extra=np.zeros(1, np.float32),
        ln_f__bias=np.zeros(10, np.int8),
    )
    with pytest.raises(WeightsError) as caught:
        from_pretrained(directory)
    assert str(caught.value).splitlines()[1:] == [
        "  - transformer.wte.weight has shape (70, 10), the config asks for (71, 10)",
        "  - transformer.h.1.ln_1.bias is missing, expected with shape (10,)",
        "  - transformer.ln_f.bias has dtype I8, expected F32, BF16, F16",
        "  - transformer.extra belongs to no part of this model",
    ]


def test_masks_of_layers_that_are_not_there(directory: Path) -> None:
    replace_tensors(directory, h__3__attn__bias=np.zeros((1, 1, 13, 13), np.float32))
    with pytest.raises(WeightsError, match=r"h\.3\.attn\.bias belongs to no part"):
        from_pretrained(directory)


def test_many_problems_are_counted(directory: Path) -> None:
    save_file({"x": np.zeros(1, np.float32)} | dict.fromkeys(map(str, range(60)), np.zeros(1)),
              directory / "model.safetensors")  # fmt: skip
    with pytest.raises(WeightsError, match=r"101 problems(.|\n)*and 61 more"):
        from_pretrained(directory)


def test_a_head_that_is_not_the_tied_one(directory: Path) -> None:
    head = TENSORS["transformer.wte.weight"].copy()
    head[-1, -1] += 1
    save_file(TENSORS | {"lm_head.weight": head}, directory / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from transformer\.wte\.w"):
        from_pretrained(directory)
    scalars = dict.fromkeys(("lm_head.weight", "transformer.wte.weight"), np.zeros(()))
    save_file(TENSORS | scalars, directory / "scalars.safetensors")
    os.replace(directory / "scalars.safetensors", directory / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lm_head\.weight has shape \(\), the config asks for"):
        from_pretrained(directory)
    save_file(TENSORS | {"lm_head.weight": head}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    model = from_pretrained(directory)
    assert model.head is not None
    assert np.array_equal(np.asarray(model.head.weight), head)


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_file_cut_short(directory: Path, kept: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or cut short"):
        from_pretrained(directory)


def test_damaged_headers(directory: Path) -> None:
    """Whatever byte of the header is changed: the same model, or a clear error."""
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    (n_header,) = struct.unpack("<Q", whole[:8])
    random = np.random.default_rng(0)
    refused = 0
    for position in random.integers(0, 8 + n_header, 30).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            from_pretrained(directory)
        except WeightsError:
            refused += 1
    assert refused > 20


def test_shards_that_are_missing_or_misplaced(tmp_path: Path) -> None:
    sharded = hf_files.write_model(tmp_path, CONFIG, TENSORS, shards=3)
    index_path = sharded / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    swapped = dict(index["weight_map"])
    swapped["transformer.wte.weight"] = "model-00002-of-00003.safetensors"
    index_path.write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(WeightsError, match=r"the index places transformer\.wte\.weight in"):
        from_pretrained(sharded)
    index_path.write_text(json.dumps(index))
    (sharded / "model-00001-of-00003.safetensors").unlink()
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError) as caught:
        from_pretrained(sharded)
    assert "model-00001-of-00003" in str(caught.value)
    assert "model-00003-of-00003" in str(caught.value)


def test_the_same_key_in_two_shards(tmp_path: Path) -> None:
    sharded = hf_files.write_model(tmp_path, CONFIG, TENSORS, shards=2)
    first, second = (sharded / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file(load_file(second) | load_file(first), second)
    with pytest.raises(WeightsError, match=r"is in model-00001.* and model-00002"):
        from_pretrained(sharded)


@pytest.mark.parametrize(
    "name", ["../hf/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, "x.bin"]
)
def test_index_that_points_elsewhere(tmp_path: Path, name: Any) -> None:
    hf_files.write_model(tmp_path / "hf", CONFIG, TENSORS)
    bad = hf_files.write_model(tmp_path / "bad", CONFIG, TENSORS, shards=2)
    index = json.dumps({"weight_map": dict.fromkeys(TENSORS, name)})
    (bad / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match="is not the name of a shard beside it"):
        from_pretrained(bad)


HOSTILE = {
    "empty": "",
    "cut": '{"model_type": "gpt2", "n_la',
    "not an object": "[1, 2]",
    "NaN": '{"model_type": "gpt2", "layer_norm_epsilon": NaN}',
    "deep": '{"model_type": "gpt2", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "long number": '{"model_type": "gpt2", "n_layer": ' + "9" * 10_000 + "}",
    "not UTF-8": b"\xff\xfe{}",
    "many layers": json.dumps(CONFIG | {"n_layer": 2**31 - 1}),
    "wide": json.dumps(CONFIG | {"n_embd": 2**31 - 5, "n_head": 1}),
    "many tokens": json.dumps(CONFIG | {"vocab_size": 2**31 - 1, "n_positions": 2**31 - 1,
                                        "n_ctx": None}),
    "no type": "{}",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_config(directory: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    (directory / "config.json").write_bytes(data)
    with pytest.raises(WeightsError):
        from_pretrained(directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_hostile_index(tmp_path: Path, text: str) -> None:
    sharded = hf_files.write_model(tmp_path, CONFIG, TENSORS, shards=2)
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="index"):
        from_pretrained(sharded)


def test_a_directory_without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"expected model\.safetensors"):
        from_pretrained(directory)
    (directory / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(WeightsError, match=r"only in pytorch_model\.bin.*convert it with trans"):
        from_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt3", "did you mean 'gpt2'"),
        ("./gpt2", r"\./gpt2 does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        ("/nowhere", "/nowhere does not exist"),
        ("model.gguf", "model.gguf does not exist"),
        (Path("gpt3"), "gpt3 does not exist"),
        ("hf/model.safetensors", "is a file; give the directory"),
        ("hf/..", "is no model: expected config.json"),
    ],
)
def test_names_that_mean_nothing(
    name: str | Path, message: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent)
    with pytest.raises(WeightsError, match=message):
        from_pretrained(name)


def test_revision_of_a_local_directory(directory: Path) -> None:
    with pytest.raises(WeightsError, match="only for the hub"):
        from_pretrained(directory, revision="main")


# Saving


def test_shards_have_at_most_the_size_asked_for(directory: Path, tmp_path: Path) -> None:
    model = from_pretrained(directory)
    save_pretrained(model, tmp_path / "out", max_shard_bytes=4000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 4000 for f in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    assert same_arrays(from_pretrained(tmp_path / "out"), model)


def test_padding_and_absent_biases(tmp_path: Path) -> None:
    config = dataclasses.replace(
        SMALL,
        n_token=65,
        dropout=0.25,
        norm=NormConfig(bias=False),
        attention=AttentionConfig(qkv_bias=False, out_bias=False),
        mlp=MLPConfig(bias=False),
    )
    model = random_model(config)
    save_pretrained(model, tmp_path / "out")
    tensors = load_tensors(tmp_path / "out")
    assert tensors["transformer.wte.weight"].shape == (65, 10)
    biases = {key for key in tensors if key.endswith("bias")}
    assert len(biases) == 3 * 6 + 1
    assert not any(tensors[key].any() for key in biases)
    loaded = from_pretrained(tmp_path / "out")
    tokens = jnp.arange(13)
    np.testing.assert_allclose(loaded(tokens), model(tokens)[:, :65], rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["resid_pdrop"] == 0.25


def test_llama_round_trip(tmp_path: Path) -> None:
    config = GPTConfig(
        block_size=31,
        vocab_size=71,
        n_layer=3,
        n_head=6,
        n_embd=12,
        head="untied",
        norm=NormConfig("rmsnorm", bias=False),
        position=PositionConfig("rope"),
        attention=AttentionConfig(n_kv_head=2, head_dim=4, qkv_bias=False, out_bias=False),
        mlp=MLPConfig("gated", "silu", 37, bias=False),
    )
    model = random_model(config)
    save_pretrained(model, tmp_path)
    assert "model.layers.2.self_attn.k_proj.weight" in load_tensors(tmp_path)
    assert same_arrays(from_pretrained(tmp_path), model)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, position=PositionConfig("rope"))
    with pytest.raises(WeightsError, match=r"gpt2: position\.kind is 'rope'"):
        save_pretrained(random_model(config), tmp_path / "out")
    model = random_model(SMALL)
    with pytest.raises(WeightsError, match="50257 tokens, the model 71"):
        save_pretrained(model, tmp_path / "out", tokenizer=GPT2Tokenizer())
    assert not list(tmp_path.iterdir())


def test_only_a_saved_model_is_replaced(directory: Path, tmp_path: Path) -> None:
    model = from_pretrained(directory)
    out = tmp_path / "out"
    save_pretrained(model, out, max_shard_bytes=4000)
    save_pretrained(model, out)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(WeightsError, match=r"holds 'notes\.txt'"):
        save_pretrained(model, out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(WeightsError, match="is a file"):
        save_pretrained(model, out / "notes.txt")
    save_pretrained(model, directory)
    assert same_arrays(from_pretrained(directory), model)


@pytest.mark.parametrize("failing", ["safetensors.numpy.save_file", "os.fsync", "os.rename"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_save_changes_nothing(
    failing: str, there: bool, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_pretrained(directory)
    out = tmp_path / "parent" / "out"
    if there:
        save_pretrained(model, out)
    before = {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()}
    rename = os.rename

    def fail(*arguments: Any, **kwargs: Any) -> None:
        # Of the renames only the one that puts the new directory in place.
        if failing == "os.rename" and ".new-" not in str(arguments[0]):
            rename(*arguments)
        else:
            raise OSError("the disk is full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_pretrained(model, out, max_shard_bytes=4000)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()} == before
    assert [p.name for p in out.parent.iterdir()] == ["out"] * there


# Tokenizers


GPT2_SIZED = GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=2)


def test_gpt2_tokenizer_is_saved_and_loaded(tmp_path: Path) -> None:
    save_pretrained(random_model(GPT2_SIZED), tmp_path, tokenizer=GPT2Tokenizer())
    loaded = load_tokenizer(tmp_path)
    text = "It's 3 o'clock…\n\n naïve 漢字 🤖 <|endoftext|>"
    assert loaded.vocab_size == 50257
    assert loaded.end_of_text == 50256
    for special in ("text", "token"):
        expected = GPT2Tokenizer().encode(text, special=special)
        assert loaded.encode(text, special=special) == expected
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 50256


def test_json_tokenizer_is_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = JSONTokenizer(gpt2_tokenizer_json(), "<|endoftext|>")
    save_pretrained(random_model(GPT2_SIZED), tmp_path, tokenizer=tokenizer)
    named = {"eos_token": "<|endoftext|>"}
    assert load_tokenizer(tmp_path) == dataclasses.replace(tokenizer, special_tokens=named)
    as_object = {"eos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(as_object))
    assert load_tokenizer(tmp_path).end_of_text == 50256


def test_char_tokenizer_is_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text("to be or not to be")
    model = random_model(SMALL)
    save_pretrained(model, tmp_path, tokenizer=tokenizer)
    assert load_tokenizer(tmp_path) == tokenizer


def test_gpt2_by_vocab_and_merges(directory: Path) -> None:
    vocab, merges = gpt2_vocab_and_merges()
    assert GPT2Tokenizer().encode("hello world") == [vocab["hello"], vocab["Ġworld"]]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (directory / "merges.txt").write_text("\n".join(lines), "utf-8")
    (directory / "vocab.json").write_text(json.dumps(vocab))
    assert load_tokenizer(directory) == GPT2Tokenizer()
    (directory / "vocab.json").write_text(json.dumps(vocab | {"hello": 7}))
    with pytest.raises(WeightsError, match="holds other ids"):
        load_tokenizer(directory)
    lines[5], lines[6] = lines[6], lines[5]
    (directory / "merges.txt").write_text("\n".join(lines), "utf-8")
    with pytest.raises(WeightsError, match="other merges than GPT-2's"):
        load_tokenizer(directory)


def test_tokenizers_that_are_not_there(directory: Path) -> None:
    assert load_tokenizer("gpt2-xl") == GPT2Tokenizer()
    with pytest.raises(WeightsError, match="has no tokenizer"):
        load_tokenizer(directory)
    (directory / "tokenizer.json").write_text('{"model": 7}')
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(WeightsError, match=r"tokenizer\.json: "):
        load_tokenizer(directory)


# Run directories


def write_run(directory: Path, model: eqx_gpt.GPT, steps: dict[str, int]) -> Path:
    """As training leaves it: a checkpoint at each step, with the step added to every weight."""
    import orbax.checkpoint as ocp

    run = {"format_version": 1, "model": model.config.to_dict(), "config": {}, "data": {}}
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps(run))
    for kept, step in steps.items():
        arrays = {name: x + step for name, x in named_arrays(model).items()}
        with ocp.CheckpointManager(directory.resolve() / kept.rstrip("!")) as manager:
            manager.save(step, args=ocp.args.Composite(model=ocp.args.StandardSave(arrays)))
    return directory


def test_run_directory(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, n_token=70, dropout=0.1)
    model = random_model(config)
    run = write_run(tmp_path / "run", model, {"checkpoints": 9, "checkpoints!": 10})
    (run / "checkpoints/11.orbax-checkpoint-tmp-1/model").mkdir(parents=True)
    assert run_checkpoint(run) == run / "checkpoints/10/model"
    loaded = from_pretrained(run)
    assert same_arrays(loaded, jax.tree.map(lambda x: x + 10, model))
    assert from_pretrained(run, dtype="bfloat16").wte.weight.dtype == jnp.bfloat16
    (run / "tokenizer_spec.json").write_text(json.dumps(CharTokenizer("abc").spec()))
    assert load_tokenizer(run) == CharTokenizer("abc")


def test_the_best_checkpoint_is_preferred(tmp_path: Path) -> None:
    model = random_model(SMALL)
    run = write_run(tmp_path / "run", model, {"checkpoints": 9, "best": 4})
    assert same_arrays(from_pretrained(run), jax.tree.map(lambda x: x + 4, model))


def test_runs_that_cannot_be_read(tmp_path: Path) -> None:
    model = random_model(SMALL)
    run = write_run(tmp_path / "run", model, {})
    with pytest.raises(WeightsError, match="no checkpoint yet"):
        from_pretrained(run)
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(WeightsError, match="format_version is 2, expected 1"):
        from_pretrained(run)
    (run / "run.json").write_text(text.replace("n_layer", "n_player"))
    with pytest.raises(WeightsError, match="no field 'n_player'"):
        from_pretrained(run)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    model = random_model(SMALL)
    run = write_run(tmp_path / "run", model, {"checkpoints": 1})
    other = dataclasses.replace(SMALL, vocab_size=73, head="untied", norm=NormConfig(bias=False))
    run_json = {"format_version": 1, "model": other.to_dict()}
    (run / "run.json").write_text(json.dumps(run_json))
    with pytest.raises(WeightsError) as caught:
        from_pretrained(run)
    assert "head.weight is missing" in str(caught.value)
    assert "norm.bias belongs to no part" in str(caught.value)
    assert "wte.weight has shape (71, 10), run.json asks for (73, 10)" in str(caught.value)


@pytest.mark.parametrize("damaged", ["_METADATA", "d/*"])
def test_a_damaged_checkpoint(damaged: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(SMALL), {"checkpoints": 1})
    for path in (run / "checkpoints/1/model").glob(damaged):
        path.write_bytes(path.read_bytes()[:10])
    # In a process of its own, for the reads that Orbax leaves behind fail whenever they like.
    assert "the checkpoint is damaged" in refusal_of(f"from_pretrained({str(run)!r})")


def test_import_is_light() -> None:
    program = (
        "import sys, weights\n"
        "heavy = {'huggingface_hub', 'orbax', 'safetensors', 'tokenizers', 'tiktoken', 'torch'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_model_laid_out_for_decoding_is_not_saved(tmp_path):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=5, vocab_size=7)
    model = for_inference(GPT.init(config, key=jax.random.key(0)))
    for save in (save_pretrained, save_gguf):
        with pytest.raises(WeightsError, match="laid out for decoding"):
            save(model, tmp_path / "model")
