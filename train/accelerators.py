"""Accelerators that a run may be planned for: what their makers publish, and what they rent for."""

from dataclasses import dataclass

from eqx_gpt.config import did_you_mean
from train.peaks import published_peak


@dataclass(frozen=True)
class Accelerator:
    """One device, from its data sheet.

    - `kind`: JAX's name of it, by which `train/peaks.py` knows its FLOP/s.
    - `memory`: bytes; `bandwidth`: bytes/s of that memory.
    - `link`: bytes/s to its neighbours, one way (NVLink, ICI; PCIe where there is neither).
    - `dollars_per_hour`: a usual price on demand in 2025. It differs by a factor of two and more
      between clouds.
    """

    kind: str
    memory: float
    bandwidth: float
    link: float
    dollars_per_hour: float

    @property
    def flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = published_peak(self.kind)
        assert peak is not None
        return peak


ACCELERATORS = {
    "b200": Accelerator("B200", 180e9, 8.0e12, 900e9, 5.5),
    "h200": Accelerator("H200", 141e9, 4.8e12, 450e9, 3.8),
    "h100": Accelerator("H100", 80e9, 3.35e12, 450e9, 3.0),
    "a100": Accelerator("A100", 80e9, 2.04e12, 300e9, 1.8),
    "a100-40gb": Accelerator("A100", 40e9, 1.56e12, 300e9, 1.4),
    "l40s": Accelerator("L40S", 48e9, 0.86e12, 32e9, 1.2),
    "l4": Accelerator("L4", 24e9, 0.30e12, 32e9, 0.7),
    "rtx4090": Accelerator("RTX 4090", 24e9, 1.01e12, 32e9, 0.4),
    "rtx3090": Accelerator("RTX 3090", 24e9, 0.94e12, 32e9, 0.25),
    "tpu-v6e": Accelerator("TPU v6e", 32e9, 1.64e12, 224e9, 2.7),
    "tpu-v5p": Accelerator("TPU v5p", 95e9, 2.77e12, 300e9, 4.2),
    "tpu-v5e": Accelerator("TPU v5e", 16e9, 0.82e12, 100e9, 1.2),
    "tpu-v4": Accelerator("TPU v4", 32e9, 1.23e12, 150e9, 3.2),
}


def parse_devices(text: str) -> tuple[str, Accelerator, int]:
    """`h100:8` as a name, the accelerator and how many; `h100` is one. ValueError otherwise."""
    name, colon, number = text.partition(":")
    name = name.lower()
    if name == "here":
        raise ValueError(f"device {text!r}: here is this machine as it is; give here alone")
    if name not in ACCELERATORS:
        known = did_you_mean(name, ACCELERATORS)
        raise ValueError(f"unknown device {name!r}; give here, or NAME or NAME:COUNT; {known}")
    if colon and not (number.isdecimal() and int(number) > 0):
        raise ValueError(
            f"device {text!r}: expected a number of 1 or above after the colon, such as {name}:8, "
            f"got {number!r}"
        )
    return name, ACCELERATORS[name], int(number) if colon else 1
