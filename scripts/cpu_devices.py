"""A CPU as several devices, where that is the faster way to train."""

from importlib.metadata import version

from scripts.environment import keep_what_threads_free
from scripts.processor import computes_on_cpu
from scripts.xla_loops import prepare_optimizer, set_xla_flags, xla_flags
from train.config import TrainConfig
from train.cores import core_devices

_NARROW = 256  # models no wider allocate little at once, and much that is small
_COUNT = "--xla_force_host_platform_device_count"
# A run that was stopped for a night, or whose machine slept, is no run that hangs: 40 s by itself.
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
# XLA makes one call of a step's sums over processes, which goes on after a sum that failed. Once a
# process has died, another would then wait for numbers that never come, or be ended for wrong ones.
_SUMS_APART = "--xla_disable_hlo_passes=cpu-all-reduce-combiner"


def prepare_training(config: TrainConfig, *, alone: bool = True) -> None:
    """Once a command knows what it will train, before jax computes: see `prepare_optimizer` and
    `core_devices`. Memory stays with the process, see `keep_what_threads_free`, if the model is
    wide; weights that are given count as such.

    In a process that is not `alone` cores stay one device, and a step's sums stay apart. Cores
    stay one device too for runs on a mesh that is named or from weights that are given, and what
    `XLA_FLAGS` says of the number of devices stays.
    """
    prepare_optimizer(config.optimizer)
    if not computes_on_cpu():
        return
    if config.n_embd > _NARROW:
        keep_what_threads_free()
    if not alone:
        set_xla_flags([*xla_flags(), _SUMS_APART])  # which adds to what is disabled
    elif config.mesh == "auto" and config.init_from == "scratch":
        rows = config.micro_batch_size or config.global_batch_size
        _split(core_devices(config.n_embd, rows, config.block_size, config.optimizer))


def _split(n: int) -> None:
    flags = xla_flags()
    if n == 1 or any(flag.startswith(_COUNT) for flag in flags):
        return
    flags.append(f"{_COUNT}={n}")
    if _knows_patience() and not any(flag.startswith(_PATIENCE) for flag in flags):
        flags.append(f"{_PATIENCE}={24 * 3600}")
    set_xla_flags(flags)


def _knows_patience() -> bool:
    """jaxlib does since 0.8; one that does not know a flag ends the process."""
    major, minor = version("jaxlib").split(".")[:2]
    return (int(major), int(minor)) >= (0, 8)
