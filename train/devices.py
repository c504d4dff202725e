"""What a run computes on: the device, the dtype, the size of a micro-batch."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from eqx_gpt.config import GPTConfig
from train.config import TrainConfig
from train.metrics import flops_per_token

# A CPU at 100 GFLOP/s takes 10 s for this: the longest wait for progress or for Ctrl-C.
_CPU_MICRO_BATCH_FLOPS = 1e12


@dataclass(frozen=True)
class Execution:
    """How the arithmetic of a step is laid out on this machine.

    `accumulate` says who loops over the micro-batches: the compiled program on the device, or,
    where one of them may take seconds, the host.
    """

    dtype: DTypeLike
    micro_batch_size: int
    n_micro: int
    accumulate: Literal["device", "host"]
    unroll: int

    @staticmethod
    def choose(config: TrainConfig, model: GPTConfig, n_params: int, platform: str) -> "Execution":
        """For a model of so many parameters on `platform` ("cpu", "gpu", "tpu")."""
        on_cpu = platform == "cpu"
        auto = jnp.float32 if on_cpu else jnp.bfloat16
        dtype = auto if config.precision == "auto" else jnp.dtype(config.precision)
        micro = config.micro_batch_size
        if micro is None:
            tokens_flops = flops_per_token(
                n_params, model.n_layer, model.n_embd, config.block_size
            )  # fmt: skip
            affordable = _CPU_MICRO_BATCH_FLOPS / (tokens_flops * config.block_size)
            micro = _largest_divisor(config.batch_size, affordable) if on_cpu else config.batch_size
        n_micro = config.global_batch_size // micro
        accumulate = "host" if on_cpu and n_micro > 1 else "device"
        # XLA's CPU backend runs the body of a loop less well than straight code.
        return Execution(
            jnp.dtype(dtype), micro, n_micro, accumulate, model.n_layer if on_cpu else 1
        )


def describe_devices() -> str:
    """The device that computes, such as `cpu` or `NVIDIA H100 80GB HBM3 (1 of 8)`."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    return kind if count == 1 else f"{kind} (1 of {count})"


def _largest_divisor(n: int, limit: float) -> int:
    return max(d for d in range(1, n + 1) if n % d == 0 and (d <= limit or d == 1))
