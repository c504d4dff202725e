"""GGUF files: written here by the gguf library and read by us, and the other way round."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import hf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import eqx_gpt
from eqx_gpt.config import GPTConfig, Llama3Scaling, PositionConfig
from eqx_gpt.tokenizer import CharTokenizer, GPT2Tokenizer, JSONTokenizer, tokenizer_from_spec
from eqx_gpt.tree import named_arrays
from weights import WeightsError, from_pretrained, load_tokenizer, save_gguf, save_pretrained
from weights.gguf_file import QUANTS, read_gguf
from weights.gguf_tokenizer import read_tokenizer, write_tokenizer
from weights.load import skeleton
from weights.tokenizer import gpt2_tokenizer_json

LAYER, HEAD, KV_HEAD, WIDTH, INNER, VOCAB, CONTEXT = 3, 6, 2, 24, 37, 71, 31
HF: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYER, "num_attention_heads": HEAD, "num_key_value_heads": KV_HEAD,
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_theta": 12345.0, "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": WIDTH, "n_layer": LAYER, "n_head": HEAD,
        "vocab_size": VOCAB, "n_positions": CONTEXT, "layer_norm_epsilon": 1e-5,
    },
}  # fmt: skip
HF["qwen2"] = {**HF["llama"], "model_type": "qwen2", "tie_word_embeddings": True}
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}  # fmt: skip
NAMES_OF_ALL = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}  # fmt: skip


def hf_tensors(name: str) -> dict[str, np.ndarray]:
    if name == "gpt2":
        return hf_files.gpt2_tensors(HF["gpt2"], "transformer.")
    kv = WIDTH // HEAD * KV_HEAD
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)
    }  # fmt: skip
    if name == "llama":
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for i in range(LAYER):
        layer = f"model.layers.{i}."
        for x, rows in {"q": WIDTH, "k": kv, "v": kv}.items():
            shapes[f"{layer}self_attn.{x}_proj.weight"] = (rows, WIDTH)
            if name == "qwen2":
                shapes[f"{layer}self_attn.{x}_proj.bias"] = (rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        shapes[layer + "mlp.up_proj.weight"] = (INNER, WIDTH)
        shapes[layer + "mlp.gate_proj.weight"] = (INNER, WIDTH)
        shapes[layer + "mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes[layer + "input_layernorm.weight"] = (WIDTH,)
        shapes[layer + "post_attention_layernorm.weight"] = (WIDTH,)
    random = np.random.default_rng(0)
    return {k: random.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}


def gguf_tensors(name: str) -> dict[str, np.ndarray]:
    """As llama.cpp's converter lays them: `permute` of its conversion/llama.py."""

    def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
        halves = weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        return halves.swapaxes(1, 2).reshape(weights.shape)

    tensors = {}
    for key, tensor in hf_tensors(name).items():
        module, _, part = key.rpartition(".")
        if module in NAMES_OF_ALL:
            tensors[f"{NAMES_OF_ALL[module]}.{part}"] = tensor
            continue
        _, _, i, inner = module.split(".", 3)
        if name == "gpt2" and tensor.ndim == 2:
            tensor = tensor.T
        if name == "llama" and inner.endswith(("q_proj", "k_proj")):
            tensor = permute(tensor, HEAD if inner.endswith("q_proj") else KV_HEAD)
        tensors[f"blk.{i}.{NAMES[inner]}.{part}"] = tensor
    return tensors


def metadata(name: str) -> dict[str, Any]:
    sizes = {
        "context_length": CONTEXT, "embedding_length": WIDTH, "block_count": LAYER,
        "feed_forward_length": 4 * WIDTH if name == "gpt2" else INNER,
        "attention.head_count": HEAD,
    }  # fmt: skip
    if name == "gpt2":
        return {**sizes, "attention.layer_norm_epsilon": 1e-5}
    return {
        **sizes,
        "attention.head_count_kv": KV_HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 12345.0,
    }


Tensors = dict[str, tuple[np.ndarray, Kind]]


def write(path: Path, name: str, values: dict[str, Any], tensors: Tensors) -> Path:
    """A name in `values` without the architecture before it gets it."""
    writer = gguf.GGUFWriter(path, name)
    for key, value in values.items():
        full = key if key.startswith(("general", "tokenizer", "split")) else f"{name}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_array)(full, value)
    for key, (tensor, kind) in tensors.items():
        writer.add_tensor(key, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain(tensors: dict[str, np.ndarray], kind: Kind = Kind.F32) -> Tensors:
    return {k: (np.ascontiguousarray(x), kind) for k, x in tensors.items()}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write(tmp_path / "llama.gguf", "llama", metadata("llama"), plain(gguf_tensors("llama")))


def random_model(config: GPTConfig) -> eqx_gpt.GPT:
    model, random = skeleton(config, "float32"), np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), model)


def same_weights(a: eqx_gpt.GPT, b: eqx_gpt.GPT) -> bool:
    ours, theirs = named_arrays(a), named_arrays(b)
    assert ours.keys() == theirs.keys()
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


# Models


@pytest.mark.parametrize("name", HF)
def test_as_the_hugging_face_directory(name: str, tmp_path: Path) -> None:
    directory = hf_files.write_model(tmp_path / "hf", HF[name], hf_tensors(name))
    path = write(tmp_path / "x.gguf", name, metadata(name), plain(gguf_tensors(name)))
    expected, found = from_pretrained(directory), from_pretrained(path)
    assert same_weights(found, expected)
    tokens = np.arange(VOCAB)[-CONTEXT:]
    assert np.array_equal(found(tokens), expected(tokens))


@pytest.mark.parametrize("name", HF)
def test_written_as_llama_cpp_does(name: str, tmp_path: Path) -> None:
    directory = hf_files.write_model(tmp_path / "hf", HF[name], hf_tensors(name))
    save_gguf(from_pretrained(directory), tmp_path / "x.gguf", dtype="F32")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    expected = gguf_tensors(name)
    assert {t.name for t in reader.tensors} == expected.keys()
    for tensor in reader.tensors:
        assert tensor.tensor_type == Kind.F32
        assert np.array_equal(tensor.data, expected[tensor.name]), tensor.name
    fields = {key: field.contents() for key, field in reader.fields.items()}
    for key, value in metadata(name).items():
        assert fields[f"{name}.{key}"] == pytest.approx(value)
    assert fields["general.architecture"] == name


@pytest.mark.parametrize(
    ("dtype", "matrix"), [("F16", "F16"), ("BF16", "BF16"), ("Q8_0", "Q8_0"), ("F32", "F32")]
)
def test_types_of_tensors(dtype: Any, matrix: str, tmp_path: Path) -> None:
    config = GPTConfig(block_size=13, vocab_size=71, n_layer=2, n_head=2, n_embd=64)
    config = dataclasses.replace(config, mlp=dataclasses.replace(config.mlp, n_inner=37))
    model, path = random_model(config), tmp_path / "x.gguf"
    save_gguf(model, path, dtype=dtype)
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert found["token_embd.weight"] == found["blk.1.attn_qkv.weight"] == matrix
    # Rows of 37 are no blocks of 32.
    assert found["blk.0.ffn_down.weight"] == ("F16" if dtype == "Q8_0" else matrix)
    vectors = {k: v for k, v in found.items() if "norm" in k or "bias" in k or "position" in k}
    assert set(vectors.values()) == {"F32"}
    ours, again = named_arrays(model), named_arrays(from_pretrained(path))
    step = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}[dtype]
    for name, x in ours.items():
        np.testing.assert_allclose(again[name], x, rtol=0, atol=step * np.abs(x).max())
    tokens = jnp.arange(13)
    if dtype == "F32":
        assert np.array_equal(model(tokens), from_pretrained(path)(tokens))
    auto = from_pretrained(path, dtype="auto").wte.weight.dtype
    assert auto == {"F16": "float16", "BF16": "bfloat16"}.get(dtype, "float32")


def test_what_llama_cpp_cannot_hold(tmp_path: Path) -> None:
    small = GPTConfig(block_size=13, vocab_size=71, n_layer=2, n_head=2, n_embd=6)
    model, path = random_model(small), tmp_path / "x.gguf"
    mlp = dataclasses.replace(small.mlp, activation="relu")
    with pytest.raises(WeightsError, match=r"gpt2, does not since mlp\.activation is 'relu'"):
        save_gguf(random_model(dataclasses.replace(small, mlp=mlp)), path)
    with pytest.raises(WeightsError, match=r"ends in \.gguf"):
        save_gguf(model, tmp_path / "x.bin")
    (tmp_path / "notes.gguf").write_text("mine")
    with pytest.raises(WeightsError, match="no GGUF file, and is not replaced"):
        save_gguf(model, tmp_path / "notes.gguf")
    (tmp_path / "notes.gguf").unlink()
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(WeightsError, match="is a directory"):
        save_gguf(model, tmp_path / "d.gguf")
    with pytest.raises(WeightsError, match="no tokenizer like CharTokenizer"):
        save_gguf(model, path, tokenizer=CharTokenizer("abc"))
    with pytest.raises(WeightsError, match="50257 tokens, the model 71"):
        save_gguf(model, path, tokenizer=GPT2Tokenizer())
    large = jax.tree.map(lambda x: x * 1e6, model)
    with pytest.raises(WeightsError, match=r"beyond 65504, the largest of F16"):
        save_gguf(large, path, dtype="F16")
    assert [p.name for p in tmp_path.iterdir()] == ["d.gguf"]
    save_gguf(large, path, dtype="BF16")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", "gguf.quantize"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_save_changes_nothing(
    failing: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(GPTConfig(block_size=13, vocab_size=71, n_layer=2, n_head=2, n_embd=6))
    path = tmp_path / "x.gguf"
    if there:
        path.write_bytes(b"GGUF, before")

    def fail(*arguments: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_gguf(model, path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"] * there
    assert not there or path.read_bytes() == b"GGUF, before"
    save_gguf(model, path, dtype="F32")
    assert same_weights(from_pretrained(path), model)


# Quantisations


def random_blocks(kind: Kind, n_rows: int, n_columns: int) -> np.ndarray:
    """Bytes of which any are valid, but for scales that are no numbers."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (n_rows, n_columns // block, n_bytes), np.uint8)
    scale = np.float16([0.011, -0.007]).view(np.uint8)
    places = {"Q2_K": -4, "Q3_K": -2, "Q6_K": -2}
    at = places.get(kind.name, 0) % n_bytes
    wide = 4 if kind.name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") else 2
    raw[..., at : at + wide] = scale[:wide]
    return raw.reshape(n_rows, -1)


def q4_k(block: bytes) -> list[float]:
    """ggml-quants.c, dequantize_row_q4_K."""
    d, low = np.frombuffer(block[:4], np.float16).astype(np.float32)
    scales, quants, out = block[4:16], block[16:], []
    for j in range(8):
        if j < 4:
            scale, minimum = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4)
            minimum = (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4)
        for byte in quants[32 * (j // 2) : 32 * (j // 2) + 32]:
            q = byte >> 4 if j % 2 else byte & 15
            out.append(d * np.float32(scale) * np.float32(q) - low * np.float32(minimum))
    return out


def q6_k(block: bytes) -> list[float]:
    """ggml-quants.c, dequantize_row_q6_K."""
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    d = np.frombuffer(block[208:], np.float16).astype(np.float32)[0]
    out = np.zeros(256, np.float32)
    for half in range(2):
        for i in range(32):
            a, b = low[64 * half + i], low[64 * half + 32 + i]
            c = high[32 * half + i]
            parts = [(a & 15, c), (b & 15, c >> 2), (a >> 4, c >> 4), (b >> 4, c >> 6)]
            for k, (four, two) in enumerate(parts):
                q = (four | ((two & 3) << 4)) - 32
                scale = np.float32(scales[8 * half + i // 16 + 2 * k])
                out[128 * half + 32 * k + i] = d * scale * np.float32(q)
    return out.tolist()


def q8_0(block: bytes) -> list[float]:
    d = np.frombuffer(block[:2], np.float16).astype(np.float32)[0]
    return (d * np.frombuffer(block[2:], np.int8)).tolist()


def q4(block: bytes) -> list[float]:
    """Q4_0 (18 bytes, from -8 on) and Q4_1 (20 bytes, with a minimum)."""
    d, *low = np.frombuffer(block[:-16], np.float16).astype(np.float32)
    quants = np.frombuffer(block[-16:], np.uint8)
    q = np.concatenate([quants & 15, quants >> 4]).astype(np.float32)
    return (d * q + low[0] if low else d * (q - 8)).tolist()


FORMULAS: dict[str, Callable[[bytes], list[float]]] = {
    "Q4_0": q4, "Q4_1": q4, "Q8_0": q8_0, "Q4_K": q4_k, "Q6_K": q6_k,
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTS)
def test_quantised_tensors(name: str, tmp_path: Path) -> None:
    """Read in pieces, against formulas written out above, or the gguf library's."""
    kind, path = Kind[name], tmp_path / "x.gguf"
    raw = random_blocks(kind, 7, 768)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(path).tensors["x"]
    assert (tensor.shape, tensor.dtype) == ((7, 768), "F32")
    found = np.concatenate([tensor.rows[:2], tensor.rows[2:7]])
    if name in FORMULAS:
        n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        data = raw.tobytes()
        blocks = [data[i : i + n_bytes] for i in range(0, len(data), n_bytes)]
        expected = np.concatenate([FORMULAS[name](block) for block in blocks]).reshape(7, 768)
    else:
        expected = gguf.dequantize(raw, kind)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_quantised_rows_are_put_in_order(tmp_path: Path) -> None:
    """Queries and keys of a quantised llama, whose rows lie in another order in the file."""
    wide = {"embedding_length": 96, "attention.head_count": 6, "attention.head_count_kv": 2}
    random = np.random.default_rng(0)
    shapes = {"attn_q": (96, 96), "attn_k": (32, 96), "attn_v": (32, 96), "attn_output": (96, 96)}
    shapes |= {"ffn_up": (32, 96), "ffn_gate": (32, 96), "ffn_down": (96, 32)}
    tensors = {f"blk.0.{k}.weight": random.normal(size=s) for k, s in shapes.items()}
    tensors |= {f"blk.0.{k}.weight": np.ones(96) for k in ("attn_norm", "ffn_norm")}
    tensors |= {
        "token_embd.weight": random.normal(size=(71, 96)),
        "output_norm.weight": np.ones(96),
    }
    typed = {
        k: (x.astype(np.float32), Kind.Q4_1 if x.ndim == 2 else Kind.F32)
        for k, x in tensors.items()
    }
    values = metadata("llama") | wide | {"block_count": 1, "feed_forward_length": 32}
    model = from_pretrained(write(tmp_path / "x.gguf", "llama", values, typed))
    dequantised = gguf.dequantize(gguf.quantize(typed["blk.0.attn_k.weight"][0], Kind.Q4_1),
                                  Kind.Q4_1)  # fmt: skip
    expected = dequantised.reshape(2, 8, 2, 96).swapaxes(1, 2).reshape(32, 96)
    assert np.array_equal(model.blocks.attention.qkv.weight[0, 96:128], expected)


# Settings that are refused


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "clamped": ({"attention.clamp_kqv": 8.0}, r"clamp_kqv is 8.0, a field that is not understood"),
    "experts": ({"expert_count": 8}, "expert_count is 8, only 0 is supported"),
    "not causal": ({"attention.causal": False}, "attention.causal is False"),
    "window": ({"attention.sliding_window": 7}, "sliding_window is 7, a field that is not under"),
    "longrope": ({"rope.scaling.type": "longrope"}, r"rope\.scaling\.type is 'longrope'"),
    "attention factor": ({"rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5"),
    "half of a head": ({"rope.dimension_count": 2}, "rope.dimension_count is 2"),
    "values": ({"attention.value_length": 8}, "value_length is 8, only that of keys, 4"),
    "text for a number": ({"block_count": "three"}, "block_count is 'three', expected a whole"),
    "unequal layers": ({"attention.head_count_kv": [2, 2, 1]}, r"head_count_kv is \[2, 2, 1\]"),
    "vocabulary": ({"vocab_size": 73}, "vocab_size is 73, token_embd.weight has 71"),
    "layers": ({"block_count": 1 << 31}, "block_count is 2147483648, but there are 30 tensors"),
    "adapter": ({"general.type": "adapter"}, "general.type is 'adapter', expected 'model'"),
    "split": ({"split.count": 2}, "one of 2 files of a model; join them"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_computed(name: str, tmp_path: Path) -> None:
    values, message = WRONG[name]
    values = metadata("llama") | values
    path = write(tmp_path / "x.gguf", "llama", values, plain(gguf_tensors("llama")))
    with pytest.raises(WeightsError, match=message):
        from_pretrained(path)


def test_missing_and_unknown(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama")
    values = metadata("llama")
    del values["attention.layer_norm_rms_epsilon"]
    with pytest.raises(WeightsError, match=r"llama\.attention\.layer_norm_rms_epsilon is"):
        from_pretrained(write(tmp_path / "a.gguf", "llama", values, plain(tensors)))
    tensors["blk.0.attn_qkv.weight"] = tensors.pop("blk.0.attn_q.weight")
    path = write(tmp_path / "b.gguf", "llama", metadata("llama"), plain(tensors))
    with pytest.raises(WeightsError) as caught:
        from_pretrained(path)
    assert "blk.0.attn_q.weight is missing, expected with shape (24, 24)" in str(caught.value)
    assert "blk.0.attn_qkv.weight belongs to no part of this model" in str(caught.value)
    path = write(tmp_path / "c.gguf", "mamba", metadata("llama"), plain(tensors))
    with pytest.raises(WeightsError, match="unknown architecture 'mamba'"):
        from_pretrained(path)
    with pytest.raises(WeightsError, match="only for the hub"):
        from_pretrained(path, revision="main")


def test_other_namespaces_are_not_read(llama: Path, tmp_path: Path) -> None:
    values = metadata("llama") | {"general.name": "x", "general.quantized_by": "someone"}
    values |= {"rope.scaling.type": "none", "attention.key_length": 4, "expert_count": 0}
    path = write(tmp_path / "x.gguf", "llama", values, plain(gguf_tensors("llama")))
    assert same_weights(from_pretrained(path), from_pretrained(llama))


def test_llama3_factors(tmp_path: Path) -> None:
    """Llama 3.2's, by the formula of transformers (modeling_rope_utils.py)."""
    theta, factor, old, head_dim = 5e5, 32.0, 8192, 18
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        smooth = (old / wavelength - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if wavelength < old / 4 else factor if wavelength > old else between)
    assert len(set(factors)) > 2
    values = metadata("llama") | {"rope.freq_base": theta, "attention.key_length": head_dim}
    values["attention.value_length"] = head_dim
    tensors = gguf_tensors("llama") | {"rope_freqs.weight": np.float32(factors)}
    for name, tensor in tensors.items():
        if ".attn_output.weight" in name:
            tensors[name] = np.zeros((WIDTH, HEAD * head_dim), np.float32)
        elif ".attn_" in name and "norm" not in name:
            n_head = HEAD if "attn_q" in name else KV_HEAD
            tensors[name] = np.zeros((n_head * head_dim, tensor.shape[1]), np.float32)
    model = from_pretrained(write(tmp_path / "x.gguf", "llama", values, plain(tensors)))
    assert model.config.position == PositionConfig(
        "rope", rope_theta=theta, rope_scaling=Llama3Scaling(factor, 1.0, 4.0, old)
    )
    save_gguf(model, tmp_path / "again.gguf", dtype="F32")
    again = read_gguf(tmp_path / "again.gguf").tensors["rope_freqs.weight"].rows[:]
    np.testing.assert_allclose(again, factors, rtol=1e-6)
    tensors["rope_freqs.weight"][3] = 3.0
    path = write(tmp_path / "x.gguf", "llama", values, plain(tensors))
    with pytest.raises(WeightsError, match=r"rope_freqs\.weight stretches positions otherwise"):
        from_pretrained(path)


# Damage


def header_bytes(path: Path) -> int:
    return int(gguf.GGUFReader(path).data_offset)


def test_cut_short(llama: Path, tmp_path: Path) -> None:
    data, cut = llama.read_bytes(), tmp_path / "cut.gguf"
    header = header_bytes(llama)
    for n in [*range(0, header, 13), *range(header, len(data) - 32, 997), len(data) - 64]:
        cut.write_bytes(data[:n])
        with pytest.raises(WeightsError, match=r"cut short|no GGUF file|mmap"):
            from_pretrained(cut)


def test_flipped_bytes(llama: Path, tmp_path: Path) -> None:
    """Each is refused, or a model of another setting, or the same model."""
    data, bad = llama.read_bytes(), tmp_path / "bad.gguf"
    expected, header, random = from_pretrained(llama), header_bytes(llama), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for at in random.integers(0, header, random.integers(1, 4)):
            damaged[at] ^= 1 << random.integers(0, 8)
        bad.write_bytes(damaged)
        try:
            model = from_pretrained(bad)
        except WeightsError:
            refused += 1
        else:
            assert model.config != expected.config or same_weights(model, expected)
    assert 150 < refused < 300


def described(*values: bytes, n_tensors: int = 0, n_values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + b"".join(values)


def text(value: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value.encode()


def number(code: str, *values: Any) -> bytes:
    return struct.pack("<" + code, *values)


HOSTILE = {
    "empty": b"",
    "other": b"PK\x03\x04" * 20,
    "version 1": described(version=1),
    "big endian": described(version=3 << 24),
    "many values": described(n_values=1 << 63),
    "many tensors": described(n_tensors=(1 << 64) - 1),
    "long key": described(text("x", 1 << 62), n_values=1),
    "key that is no text": described(number("Q", 2), b"\xff\xfe", n_values=1),
    "unknown type": described(text("x"), number("I", 99), n_values=1),
    "list of lists": described(text("x"), number("IIQ", 9, 9, 1 << 40), n_values=1),
    "long list": described(text("x"), number("IIQ", 9, 4, 1 << 61), n_values=1),
    "long list of texts": described(text("x"), number("IIQ", 9, 8, 1 << 61), n_values=1),
    "twice": described((text("x") + number("II", 4, 1)) * 2, n_values=2),
    "no alignment": described(text("general.alignment"), number("II", 4, 0), n_values=1),
    "odd alignment": described(text("general.alignment"), number("II", 4, 3), n_values=1),
    "text as alignment": described(
        text("general.alignment"), number("I", 8), text("x"), n_values=1
    ),
    "no dimensions": described(text("x"), number("IIQ", 0, 0, 0), n_tensors=1),
    "many dimensions": described(text("x"), number("I", 1 << 31), n_tensors=1),
    "large": described(text("x"), number("IQQIQ", 2, 1 << 40, 1 << 40, 0, 0), n_tensors=1),
    "overflowing": described(text("x"), number("IQQIQ", 2, 1 << 63, 4, 0, 0), n_tensors=1),
    "far": described(text("x"), number("IQIQ", 1, 4, 0, 1 << 62), n_tensors=1),
    "unknown quantisation": described(text("x"), number("IQIQ", 1, 4, 77, 0), n_tensors=1),
    "part of a block": described(text("x"), number("IQIQ", 1, 33, 8, 0), n_tensors=1),
    "no architecture": described(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name] + b"\0" * (0 if name == "empty" else 64))
    with pytest.raises(WeightsError, match=r"x\.gguf"):
        from_pretrained(path)
    if name != "no architecture":
        with pytest.raises(WeightsError, match=r"x\.gguf"):
            load_tokenizer(path)


def test_types_that_are_not_read(tmp_path: Path) -> None:
    tensors = plain(gguf_tensors("llama"))
    name = "output_norm.weight"
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata("llama").items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"llama.{key}", value
        )
    for key, (tensor, _) in tensors.items():
        writer.add_tensor(key, tensor.astype(np.float64) if key == name else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightsError, match=f"{name} has dtype F64, expected F32"):
        from_pretrained(path)


# Tokenizers


TEXT = "It's 3 o'clock…\n\n naïve 漢字 🤖 <|endoftext|>  12345 "


def test_gpt2_tokenizer(tmp_path: Path) -> None:
    model = random_model(GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=2))
    save_gguf(model, tmp_path / "x.gguf", tokenizer=GPT2Tokenizer())
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 50304
    assert fields["tokenizer.ggml.tokens"].contents(50300) == "[PAD50300]"
    loaded = load_tokenizer(tmp_path / "x.gguf")
    assert (loaded.vocab_size, loaded.end_of_text) == (50257, 50256)
    assert loaded.special_tokens == GPT2Tokenizer().special_tokens
    for special in ("text", "token"):
        expected = GPT2Tokenizer().encode(TEXT, special=special)
        assert loaded.encode(TEXT, special=special) == expected
        assert loaded.decode(expected) == TEXT


KEY = "tokenizer.ggml."
SENTENCEPIECE: dict[str, Any] = {
    KEY + "model": "llama",
    KEY + "tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "\u2581", "a", "b",
                     "ab", "\u2581a", "ba", "<tool>"],
    KEY + "token_type": [2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 4],
    KEY + "scores": [0.0] * 6 + [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0, 0.0],
    KEY + "eos_token_id": 2,
    KEY + "eot_token_id": 12,
    "tokenizer.chat_template": "{{ messages }}",
}  # fmt: skip


def test_sentencepiece(tmp_path: Path) -> None:
    """By hand: the best pair first, a space before each piece, bytes for what is unknown."""
    tokenizer = read_tokenizer(SENTENCEPIECE)
    assert tokenizer is not None
    assert tokenizer.encode("ab ba") == [10, 8, 6, 11]  # ▁a b ▁ ba
    assert tokenizer.encode("a\né") == [10, 3, 4, 5]
    assert tokenizer.encode("a<tool>b") == [10, 12, 6, 8]
    assert tokenizer.encode("<s>a", special="token") == [1, 10]
    assert tokenizer.decode([10, 8, 6, 11]) == "ab ba"
    assert (tokenizer.end_of_text, tokenizer.stop_tokens) == (2, ("<tool>",))
    assert tokenizer.special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"
    }  # fmt: skip
    written = write_tokenizer(tokenizer, 17)
    assert written[KEY + "tokens"][13:] == ["[PAD13]", "[PAD14]", "[PAD15]", "[PAD16]"]
    assert written[KEY + "add_bos_token"] is True
    assert read_tokenizer(written) == tokenizer
    other = json.loads(tokenizer.tokenizer_json)
    other["model"]["merges"].pop()
    with pytest.raises(WeightsError, match="does not merge by the scores"):
        write_tokenizer(JSONTokenizer(json.dumps(other)), 17)


def test_what_lies_beside_survives(tmp_path: Path) -> None:
    """Special tokens, several ends and the template: GGUF, our object, its spec, HF, and back."""
    tokenizer = read_tokenizer(SENTENCEPIECE)
    assert tokenizer is not None
    assert tokenizer_from_spec(json.loads(json.dumps(tokenizer.spec()))) == tokenizer
    model = random_model(GPTConfig(block_size=8, vocab_size=13, n_layer=1, n_head=1, n_embd=2))
    save_gguf(model, tmp_path / "a.gguf", tokenizer=tokenizer)
    found = load_tokenizer(tmp_path / "a.gguf")
    save_pretrained(model, tmp_path / "hf", tokenizer=found)
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, [2, 12])
    assert (tmp_path / "hf/chat_template.jinja").read_text() == "{{ messages }}"
    found = load_tokenizer(tmp_path / "hf")
    assert found == tokenizer
    save_pretrained(model, tmp_path / "hf", tokenizer=found)
    malformed = {**tokenizer.spec(), "stop_tokens": [7]}
    with pytest.raises(ValueError, match="malformed spec"):
        tokenizer_from_spec(malformed)
    with pytest.raises(ValueError, match="'<nothing>' is not in the vocabulary"):
        dataclasses.replace(tokenizer, stop_tokens=("<nothing>",))


def test_flipped_bytes_of_a_tokenizer(tmp_path: Path) -> None:
    bytes_only = json.loads(gpt2_tokenizer_json())
    vocab = {t: i for t, i in bytes_only["model"]["vocab"].items() if i < 258}
    bytes_only["model"] |= {"vocab": vocab, "merges": bytes_only["model"]["merges"][:2]}
    bytes_only["added_tokens"] = []
    byte_level = write_tokenizer(JSONTokenizer(json.dumps(bytes_only)), 258)
    bad, random, refused = tmp_path / "bad.gguf", np.random.default_rng(0), 0
    for values in (SENTENCEPIECE, byte_level):
        data = write(tmp_path / "x.gguf", "llama", values, {}).read_bytes()
        for _ in range(150):
            damaged = bytearray(data)
            for at in random.integers(0, len(data), 3):
                damaged[at] ^= 1 << random.integers(0, 8)
            bad.write_bytes(damaged)
            try:
                tokenizer = load_tokenizer(bad)
                assert set(tokenizer.encode("ab\u00e9")) <= set(range(tokenizer.vocab_size))
            except WeightsError:
                refused += 1
    assert 30 < refused < 290


BYTE_LEVEL = write_tokenizer(JSONTokenizer(gpt2_tokenizer_json(), "<|endoftext|>"), 50257)
NOT_READ: dict[str, tuple[dict[str, Any], str]] = {
    "split": ({KEY + "pre": "tekken"}, "pre is 'tekken', a way to split text that is not known"),
    "model": ({KEY + "model": "t5"}, "model is 't5', only 'gpt2' and 'llama'"),
    "no merges": ({KEY + "merges": None}, "merges: expected a list of str, found nothing"),
    "merge": ({KEY + "merges": ["ab"]}, "'ab' is no pair of tokens"),
    "merge of others": ({KEY + "merges": ["\u00e9\u00e9 x"]}, "does not make a token from two"),
    "long token": ({KEY + "tokens": ["a" * 1025] + ["b"] * 50256}, "different texts|1025 char"),
    "types": ({KEY + "token_type": [1]}, "token_type has 1 entries for 50257"),
    "numbers": ({KEY + "tokens": [1, 2]}, r"tokens: expected a list of str, found \[1, 2\]"),
    "the same twice": ({KEY + "tokens": ["a"] * 50257}, "expected different texts"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_tokenizers_that_are_not_read(name: str) -> None:
    changes, message = NOT_READ[name]
    with pytest.raises(WeightsError, match=message):
        read_tokenizer({k: v for k, v in {**BYTE_LEVEL, **changes}.items() if v is not None})


def test_tokenizers_that_are_not_written() -> None:
    plain = json.loads(gpt2_tokenizer_json())
    for change, message in {
        "pre_tokenizer": "splits text by .*Whitespace",
        "added_tokens": "takes spaces, which GGUF cannot hold",
        "model": "of type 'WordLevel', only BPE",
    }.items():
        other = json.loads(json.dumps(plain))
        if change == "pre_tokenizer":
            other["pre_tokenizer"] = {"type": "Whitespace"}
        elif change == "added_tokens":
            other["added_tokens"][0]["lstrip"] = True
        else:
            other["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
            other["added_tokens"] = []
        with pytest.raises(WeightsError, match=message):
            write_tokenizer(JSONTokenizer(json.dumps(other)), 50257)
