"""Attention by kernels that others wrote: cuDNN's on NVIDIA GPUs, Pallas' splash attention on TPUs.

Both are causal, never hold seq x seq scores and bring gradients of their own. What they cannot
do, `refusal` says in a line; the plain products of `attention.py` do it then.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Platform = Literal["cuda", "tpu"]

_TPU_BLOCK = 128  # splash attention's smallest tile of queries and of keys
_lowering_for: ContextVar[Platform | Literal["cpu"] | None] = ContextVar(
    "lowering_for", default=None
)


def platform() -> Platform | None:
    """The platform of this process whose kernels these are; None where there are none.

    Asked in Python while a program is traced, not by `lax.platform_dependent`: a branch of cuDNN
    fails where there is none, and one of Pallas is traced, and Pallas imported, on every CPU.
    """
    here: dict[str, Platform] = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
    return here.get(_lowering_for.get() or jax.default_backend())


@contextmanager
def lowering_for(chosen: Platform | Literal["cpu"]) -> Iterator[None]:
    """What is traced within is meant for `chosen`: to be exported from a machine without it,
    or to run on the CPU of a machine that has another.

    What jax has traced before it uses again: `jax.clear_caches()` first.
    """
    token = _lowering_for.set(chosen)
    try:
        yield
    finally:
        _lowering_for.reset(token)


def refusal(
    platform: Platform,
    *,
    dtype: DTypeLike,
    head_dim: int,
    seq: int,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    packed: bool = False,
) -> str | None:
    """Why `attention` cannot compute this on `platform`; None if it can.

    For "cuda" jax itself is asked whether its cuDNN takes these shapes on this machine's GPU, so
    elsewhere than on such a machine the answer is never None.
    """
    if dropout:
        return "it has no dropout"
    if platform == "tpu":
        if seq < _TPU_BLOCK:
            return f"{seq} positions do not fill one of its tiles of {_TPU_BLOCK}"
        return None
    if packed:
        return "it does not tell the documents within a sequence apart"
    if softcap is not None:
        return "it has no soft cap of the scores"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    q = jax.ShapeDtypeStruct((1, seq, 1, head_dim), dtype)

    def forward_and_back(q: Array) -> Any:  # either can be refused
        out, pull = jax.vjp(lambda q: _cudnn(q, q, q, window, 1.0), q)
        return pull(out)

    try:
        jax.eval_shape(forward_and_back, q)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).strip().split("\n")[0]
    return None


def attention(
    platform: Platform,
    q: Float[Array, "*batch seq head head_dim"],
    k: Float[Array, "*batch seq kv_head head_dim"],
    v: Float[Array, "*batch seq kv_head head_dim"],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    starts: Int[Array, "*batch seq"] | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch seq head head_dim"]:
    """`causal_attention` of whole sequences, where `refusal` is None.

    `interpret` runs the TPU's kernel step by step on any machine, to test it.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch = q.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    if platform == "cuda":
        mixed = _cudnn(q, k, v, window, scale)
    else:
        starts = None if starts is None else starts.reshape(-1, starts.shape[-1])
        mixed = _splash(q, k, v, starts, window, scale, softcap, interpret)
    return mixed.reshape(*batch, *mixed.shape[1:])


def _cudnn(q: Array, k: Array, v: Array, window: int | None, scale: float) -> Array:
    seq = q.shape[1]
    # Its gradients want an even length. A zero after the end is a key that no real query sees.
    q, k, v = (jnp.pad(x, ((0, 0), (0, seq % 2), (0, 0), (0, 0))) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    return mixed[:, :seq]


def _splash(
    q: Array,
    k: Array,
    v: Array,
    starts: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> Array:
    # Importing Pallas takes longer than many a program here.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    seq, head = q.shape[1:3]
    # The kernel wants whole tiles. Zeros after the end are keys that no real query sees.
    padded = -(-seq // _TPU_BLOCK) * _TPU_BLOCK
    block = next(size for size in (512, 256, 128) if padded % size == 0)
    shape = (padded, padded)
    left = None if window is None else window - 1
    mask = splash.LocalMask(shape, (left, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * head),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap, head_shards=1, q_seq_shards=1, interpret=interpret,
    )  # fmt: skip
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel does not scale
    q, k, v = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - seq), (0, 0)))
        for x in (q, k, v)
    )
    segments = None
    if starts is not None:  # a document is known by its beginning as well as by a number
        ids = jnp.pad(starts, ((0, 0), (0, padded - seq)), constant_values=-1)
        segments = splash.SegmentIds(q=ids, kv=ids)
    mixed: Any = jax.vmap(kernel)(q, k, v, segments)
    return jnp.swapaxes(mixed[:, :, :seq], 1, 2)
