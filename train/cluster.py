"""How a process learns that it is one of several: by flags, or by what started it. No jax."""

import glob
import importlib.util
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Hosts:
    """Where the processes of a run meet. All None: found on SLURM, Kubernetes, TPUs and by Open
    MPI, otherwise there is one process."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, of a run of several processes that JAX does not find by itself."""
    num_processes: int | None = None
    """How many processes there are; each on a host or with devices of its own."""
    process_id: int | None = None
    """Which this one is, from 0."""

    def __post_init__(self) -> None:
        given = (self.coordinator_address, self.num_processes, self.process_id)
        if None in given and given != (None, None, None):
            raise ValueError(
                "coordinator_address, num_processes and process_id go together, got "
                f"{self.coordinator_address!r}, {self.num_processes!r}, {self.process_id!r}; give "
                "all three to each process, or none"
            )
        if self.coordinator_address is not None:
            _, colon, port = self.coordinator_address.rpartition(":")
            if not colon or not port.isdigit():
                raise ValueError(
                    f"coordinator_address={self.coordinator_address!r} has no port; give HOST:PORT"
                )
        if not 0 <= (self.process_id or 0) < (self.num_processes or 1):
            raise ValueError(
                f"process_id={self.process_id} is none of num_processes={self.num_processes}; "
                "they count from 0"
            )

    @property
    def alone(self) -> bool:
        """Is this process the only one, as far as is known before they meet?"""
        return (self.num_processes or 1) == 1 and found_cluster() in (None, "a TPU")


def found_cluster() -> str | None:
    """What tells of several processes here, in a form that JAX understands; None for nothing."""
    env = os.environ
    if env.get("JAX_COORDINATOR_ADDRESS"):
        return "JAX_COORDINATOR_ADDRESS"
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    if importlib.util.find_spec("libtpu") and glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*"):
        return "a TPU"
    return None
