"""What devices can do at most: the denominator of MFU."""

import re
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

# Dense products of bfloat16 (float16 where there are none) with float32 sums, of one device of
# JAX's in 1e12 FLOP/s, from the makers' data sheets; without sparsity, which doubles NVIDIA's.
# Keys are words of `device_kind`; the first one found counts.
_PEAKS: Mapping[str, float] = {
    "GB300": 2500,
    "B300": 2250,
    "GB200": 2500,
    "B200": 2250,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H800 PCIe": 756,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX A5000": 111,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100-PCIE": 112,
    "V100": 125,
    "T4": 65,
    "MI355X": 2517,
    "MI350X": 2307,
    "MI325X": 1307,
    "MI300X": 1307,
    "MI300A": 981,
    # Two dies a card, each a device.
    "MI250X": 191.5,
    "MI250": 181,
    "MI210": 181,
    # Two cores a chip are two devices up to v3 and again from v7 on.
    "TPU7x": 1153.5,
    "TPU7": 1153.5,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v4 lite": 138,
    "TPU v4": 275,
    "TPU v3": 61.5,
    "TPU v2": 22.5,
}
# Weaker chips by the name of a stronger one, and parts of a chip.
_OTHERS = re.compile(r"\b(Laptop|Max-Q|Mobile|MIG|4090 D|5090 D)\b")


def peak_flops(dtype: DTypeLike) -> float | None:
    """The peak of all devices together, of all hosts, in FLOP/s.

    Of accelerators it is the published one of bfloat16, whatever `dtype` is: a float32 run is
    measured by what the device could do. Of a CPU it is measured, in `dtype`; its virtual devices
    share it. None for an accelerator that the table does not know, and for several processes on
    CPUs, which may share one.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_matmul_flops(dtype) if jax.process_count() == 1 else None
    peak = published_peak(device.device_kind)
    return None if peak is None else peak * jax.device_count()


def published_peak(device_kind: str) -> float | None:
    """Of one device, in FLOP/s, by JAX's name of its kind. None if the table has none."""
    if _OTHERS.search(device_kind):
        return None
    for words, teraflops in _PEAKS.items():
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(words)}(?![A-Za-z0-9])", device_kind):
            return teraflops * 1e12
    return None


def _measured_matmul_flops(dtype: DTypeLike) -> float:
    """The best of a few products of 1024 x 1024 matrices, one on each device at the same time."""
    n, devices = 1024, jax.devices()
    a = [jax.device_put(np.ones((n, n), dtype), device) for device in devices]
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    times = []
    with jax.set_mesh(Mesh(np.empty((), object), ())):  # none: each device has a product of its own
        for _ in range(11):  # the first one compiles
            start = time.perf_counter()
            jax.block_until_ready([product(each) for each in a])
            times.append(time.perf_counter() - start)
    return 2 * n**3 * len(devices) / min(times)
