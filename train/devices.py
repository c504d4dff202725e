"""What a run computes on: the device, the dtype, the size of a micro-batch."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from eqx_gpt.config import GPTConfig
from eqx_gpt.ops import fused, onednn
from train.config import Remat, TrainConfig
from train.cores import cached_tokens, wide
from train.metrics import flops_per_token

# A CPU at 100 GFLOP/s, 300 in bfloat16, takes 10 s for this: where a step is longer, the host looks
# after each micro-batch, of so much at most, for progress and for Ctrl-C.
_CPU_FLOPS = {"float32": 1e12, "bfloat16": 3e12}


@dataclass(frozen=True)
class Execution:
    """How the arithmetic of a step is laid out on this machine.

    `accumulate` says who loops over the micro-batches: the compiled program on the device, or,
    where a step takes many seconds, the host.
    """

    dtype: DTypeLike
    micro_batch_size: int
    n_micro: int
    accumulate: Literal["device", "host"]
    unroll: int
    products: onednn.Products = "xla"

    @staticmethod
    def choose(
        config: TrainConfig,
        model: GPTConfig,
        n_params: int,
        platform: str,
        n_frozen: int = 0,
        n_parts: int = 1,
        meshed: bool = False,
    ) -> "Execution":
        """For a model of so many parameters on `platform` ("cpu", "gpu", "tpu"), and micro-batches
        that are split in `n_parts`; `meshed`: on a mesh of devices, whatever it splits.

        On a mesh as under nanoGPT's launcher: each part has batch_size sequences, as far as the
        global batch, which stays what it was, has so many.
        """
        on_cpu = platform == "cpu"
        auto = jnp.float32 if on_cpu and not cpu_multiplies_bfloat16() else jnp.bfloat16
        dtype = jnp.dtype(auto if config.precision == "auto" else config.precision)
        micro = config.micro_batch_size
        flops_of_one = config.block_size * flops_per_token(
            n_params, model.n_layer, model.n_embd, config.block_size, n_frozen
        )
        budget = _CPU_FLOPS.get(dtype.name, 1e12)
        long = config.global_batch_size * flops_of_one > budget
        if micro is None:
            most, cached = float(config.batch_size), math.inf
            if on_cpu:
                share = 1 if n_parts == 1 else jax.process_count() / n_parts
                most = min(most, share * budget / flops_of_one)
            if on_cpu and not long:
                alone = n_parts > jax.process_count()
                cached = cached_tokens(model.n_embd, alone=alone) / config.block_size
            each = config.batch_size if n_parts == 1 else config.global_batch_size // n_parts
            micro = n_parts * _fitting_divisor(each, most, cached)
        elif micro % n_parts:
            raise ValueError(
                f"micro_batch_size={micro} is not split evenly over the mesh, {n_parts} parts; "
                f"give a multiple of {n_parts}, or leave it out"
            )
        n_micro = config.global_batch_size // micro
        accumulate = "host" if on_cpu and n_micro > 1 and long else "device"
        unroll = model.n_layer if unrolls(platform, model.remat, meshed or n_parts > 1) else 1
        asked = "xla" if config.eval_only else config.products
        whole = on_cpu and not meshed and n_parts == 1
        products = _products(asked, model.n_embd, dtype, whole)
        return Execution(dtype, micro, n_micro, accumulate, unroll, products)


def unrolls(platform: str, remat: Remat, meshed: bool = False) -> bool:
    """Whether layers run as straight code instead of a loop.

    XLA runs the body of a loop less well on CPUs, and on GPUs a loop copies what it keeps for the
    backward pass: a sixth of a step of GPT-2, all in all. But it may see in straight code that
    what is computed again was there before, and keep it; and gather all of a mesh's weights at
    once. The arrangements of CPUs do not let it.
    """
    return platform == "cpu" or (platform == "gpu" and remat == "none" and not meshed)


def _products(
    asked: Literal["auto", "xla", "onednn"], n_embd: int, dtype: DTypeLike, whole: bool
) -> onednn.Products:
    """**Raises:** ValueError where oneDNN is asked for and cannot be had."""
    if asked == "xla" or (asked == "auto" and not wide(n_embd)):
        return "xla"
    why = onednn.refusal() if whole else "they are for one device, a CPU, and nothing splits them"
    if dtype != jnp.bfloat16:
        why = f"they are for bfloat16, and precision is {jnp.dtype(dtype).name}"
    if asked == "onednn" and why is not None:
        raise ValueError(f"there are no products=onednn here: {why}; give products=xla, or auto")
    return "xla" if why is not None else "onednn"


def cpu_multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Has this CPU instructions for it? Without them float32 is faster."""
    try:
        flags = cpuinfo.read_text(errors="replace")
    except OSError:  # no Linux
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


def describe_devices() -> str:
    """The device that computes, such as `cpu` or `NVIDIA H100 80GB HBM3 (1 of 8)`."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if count == 1:
        return kind
    n_process = jax.process_count()
    return f"{count} x {kind}" + (f" in {n_process} processes" if n_process > 1 else "")


def describe_arithmetic(
    execution: Execution, model: GPTConfig, seq: int, packed: bool = False
) -> str:
    """The dtype of the products, and where there are fused kernels, which attention runs."""
    library = " by oneDNN" if execution.products == "onednn" else ""
    products = f"{jnp.dtype(execution.dtype).name} products{library}"
    platform = fused.platform()
    if platform is None:
        return f"{products}, attention in blocks"
    name = {"cuda": "cuDNN", "tpu": "splash attention"}[platform]
    why = {
        fused.refusal(
            platform, dtype=execution.dtype, head_dim=model.head_dim, seq=seq, window=kind.window,
            softcap=model.attention.softcap, dropout=model.weights_dropout, packed=packed,
        )
        for kind in model.layers
    } - {None}  # fmt: skip
    if not why:
        return f"{products}, attention by {name}"
    return f"{products}, plain attention because of {name}: {'; '.join(sorted(map(str, why)))}"


def _fitting_divisor(n: int, most: float, better: float) -> int:
    """The largest divisor of `n` up to `most`, and up to `better` if it is not far below."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    largest, small = (max(d for d in divisors if d <= max(1, up_to)) for up_to in (most, better))
    return small if small < largest and 4 * small >= better else largest
