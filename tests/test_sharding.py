"""Models on a mesh: where the leaves lie, and that they are the same leaves.

One process with eight devices answers for all of the tests (tests/eight_devices.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_weights
from eight_devices import MESHES

from eqx_gpt.config import AttentionConfig, GPTConfig, MLPConfig, NormConfig, PositionConfig
from eqx_gpt.sharding import shardings
from weights import save_pretrained
from weights.load import skeleton

# Heads, widths and rows that 8, 4, 3 and 2 do divide, and a vocabulary that only 3 does.
GPT2 = hf_files.GPT2_CONFIG | {
    "vocab_size": 93, "n_positions": 13, "n_ctx": 13, "n_embd": 24, "n_head": 3, "n_layer": 2,
}  # fmt: skip
LLAMA = GPTConfig(
    block_size=11,
    vocab_size=88,
    n_layer=3,
    n_head=6,
    n_embd=40,
    head="untied",
    norm=NormConfig("rmsnorm", bias=False),
    position=PositionConfig("rope"),
    attention=AttentionConfig(n_kv_head=2, head_dim=4, qkv_bias=False, out_bias=False),
    mlp=MLPConfig("gated", "silu", n_inner=56, bias=False),
)
KINDS = ("gpt2", "llama", "gpt_neox", "run")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    hf_files.write_model(root / "gpt2", GPT2, hf_files.gpt2_tensors(GPT2, "transformer."))
    neox = hf_files.GPT_NEOX_CONFIG
    hf_files.write_model(root / "gpt_neox", neox, hf_files.gpt_neox_tensors(neox), shards=2)
    save_pretrained(test_weights.random_model(LLAMA), root / "llama")
    test_weights.write_run(root / "run", test_weights.random_model(LLAMA), {"checkpoints": 3})
    program = Path(__file__).with_name("eight_devices.py")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, str(program), *(str(root / kind) for kind in KINDS)],
        env={**os.environ, **flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_arrays_are_the_same(kind: str, mesh: str, found: dict[str, Any]) -> None:
    assert found["facts"][kind][mesh]["equal"]
    shape, _ = MESHES[mesh]
    assert found["facts"][kind][mesh]["devices"] == np.prod(shape)


@pytest.mark.parametrize("kind", [*KINDS, "explicit"])
def test_the_model_computes_the_same(kind: str, found: dict[str, Any]) -> None:
    """As float64, over data, fsdp and tensor; `explicit` on axes as `jax.make_mesh` makes them."""
    # Each sum is of at most 96 products.
    assert found["errors"][kind] < 96 * np.finfo(np.float32).eps


def test_gpt2_on_data_fsdp_and_tensor(found: dict[str, Any]) -> None:
    """13 positions and 93 tokens are not halved; the layers never are."""
    assert found["facts"]["gpt2"]["data=2,fsdp=2,tensor=2"]["specs"] == {
        "wte.weight": [None, "fsdp"],
        "wpe.weight": [None, "fsdp"],
        "blocks.norm1.weight": [None, None],
        "blocks.norm1.bias": [None, None],
        "blocks.attention.qkv.weight": [None, "tensor", "fsdp"],
        "blocks.attention.qkv.bias": [None, "tensor"],
        "blocks.attention.out.weight": [None, "fsdp", "tensor"],
        "blocks.attention.out.bias": [None, None],
        "blocks.norm2.weight": [None, None],
        "blocks.norm2.bias": [None, None],
        "blocks.mlp.up.weight": [None, "tensor", "fsdp"],
        "blocks.mlp.up.bias": [None, "tensor"],
        "blocks.mlp.down.weight": [None, "fsdp", "tensor"],
        "blocks.mlp.down.bias": [None, None],
        "norm.weight": [None],
        "norm.bias": [None],
    }


def test_shards_of_llama(found: dict[str, Any]) -> None:
    """By hand: 4 parts of what tensor splits, 2 of what fsdp splits, 3 layers in every shard."""
    for kind in ("llama", "run"):
        assert found["facts"][kind]["tensor=4,fsdp=2"]["shards"] == {
            "wte.weight": [22, 20],
            "blocks.norm1.weight": [3, 40],
            "blocks.attention.qkv.weight": [3, 10, 20],
            "blocks.attention.out.weight": [3, 20, 6],
            "blocks.norm2.weight": [3, 40],
            "blocks.mlp.up.weight": [3, 14, 20],
            "blocks.mlp.gate.weight": [3, 14, 20],
            "blocks.mlp.down.weight": [3, 20, 14],
            "norm.weight": [40],
            "head.weight": [22, 20],
        }


def test_what_is_not_split(found: dict[str, Any]) -> None:
    for mesh in ("data=8", "fsdp=1"):
        shards = found["facts"]["llama"][mesh]["shards"]
        assert shards["wte.weight"] == [88, 40]
        assert shards["blocks.mlp.down.weight"] == [3, 40, 56]
    three = found["facts"]["llama"]["tensor=3"]["specs"]
    assert three["wte.weight"] == [None, None]  # 88 tokens
    assert three["blocks.attention.qkv.weight"] == [None, None, None]  # 40 rows
    assert three["blocks.attention.out.weight"] == [None, None, "tensor"]  # 24 columns


def test_the_host_holds_one_shard(found: dict[str, Any]) -> None:
    whole = 3 * 56 * 40
    assert found["facts"]["llama"]["data=8"]["largest"] == max(whole, 88 * 40)
    assert found["facts"]["llama"]["fsdp=8"]["largest"] == whole // 8


def test_unknown_axes_are_refused(found: dict[str, Any]) -> None:
    assert "axis 'model', expected data, fsdp, tensor" in found["refused"]
    mesh = jax.make_mesh((1,), ("rows",))
    with pytest.raises(ValueError, match="axis 'rows'"):
        shardings(skeleton(LLAMA, "float32"), mesh)


def test_shardings_serve_arrays_as_well_as_shapes() -> None:
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
    model = test_weights.random_model(LLAMA)
    assert shardings(model, mesh) == shardings(skeleton(LLAMA, "float32"), mesh)
    down = shardings(model, mesh)["blocks.mlp.down.weight"]
    placed = jax.device_put(model.blocks.mlp.down.weight, down)
    assert jnp.array_equal(placed, model.blocks.mlp.down.weight)
