"""The processes of a run, one or many: how they find each other, agree, and who writes.

They are JAX's own (`jax.distributed`): each runs the same program on its devices, and whatever is
computed on arrays of all devices has to be called by all of them in the same order. So decisions
that one of them makes alone, of signals and clocks, are put to a `Vote`.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.cluster import Hosts, found_cluster

T = TypeVar("T")

# What JAX waits for a process that is silent before it ends the others, and for the others at the
# end of the program.
HEARTBEAT_S = 30
SHUTDOWN_S = 60
DIED = 70

_LINE = 200  # bytes

# How XLA begins what it says of a program that failed.
_FAILED_PROGRAM = re.compile(
    "(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|RESOURCE_EXHAUSTED"
    "|FAILED_PRECONDITION|ABORTED|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS): "
)

EXPECTED = (ValueError, OSError, KeyboardInterrupt, jax.errors.JaxRuntimeError)


def join(hosts: Hosts, timeout_s: int = 300) -> None:
    """Meet the run's other processes, if there are any. To be called before JAX computes.

    **Raises:** ValueError if they do not come together.
    """
    where = "the flags" if hosts.coordinator_address else found_cluster()
    if where is None or hosts.num_processes == 1:
        return
    try:
        jax.distributed.initialize(
            hosts.coordinator_address,
            hosts.num_processes,
            hosts.process_id,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except (RuntimeError, ValueError) as error:
        if where == "a TPU":  # one host that is no part of a pod
            return
        raise ValueError(
            f"the processes that {where} told of did not come together: {error}"
        ) from None


def is_writer() -> bool:
    """Is this the process that writes files and to the terminal?"""
    return jax.process_index() == 0


def told(text: str) -> list[str]:
    """What each process of the run says, in their order; all of them call this together."""
    if jax.process_count() == 1:
        return [text]
    line = text.encode()[:_LINE].ljust(_LINE)
    lines = multihost_utils.process_allgather(np.frombuffer(line, np.uint8))
    return [bytes(each).decode(errors="replace").rstrip() for each in np.asarray(lines)]


class Vote:
    """The largest of a small number that each process gives.

    The answer is to what was given at the call before this one: the devices work meanwhile, and
    nobody waits for them but in lockstep. In a run of one process it is at once what is given.
    """

    def __init__(self) -> None:
        self._many = jax.process_count() > 1
        if self._many:
            devices = np.array(jax.devices())
            self._where = NamedSharding(Mesh(devices, ("device",)), PartitionSpec("device"))
            whole = NamedSharding(self._where.mesh, PartitionSpec())
            self._largest = jax.jit(jnp.max, out_shardings=whole)
            self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if not self._many:
            return number
        before = self._before
        mine = np.full((1,), number, np.int32)
        shape = (jax.device_count(),)
        ballot = jax.make_array_from_callback(shape, self._where, lambda _: mine)
        self._before = self._largest(ballot)
        if in_lockstep():
            jax.block_until_ready(self._before)
        return 0 if before is None else int(before)


def in_lockstep() -> bool:
    """Has each step to be waited for before anything else is begun?

    So with processes on CPUs. What is computed after a sum that failed, for a peer was gone, would
    send numbers to a process that still waits for the sum's, and that would be ended by Gloo, with
    a message that blames the code.
    """
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


def met_by_all(error: BaseException) -> bool:
    """Does each of the run's processes come to this error by itself? So with a user's mistakes.

    A program that fails where it was called raises a ValueError too, but of one process.
    """
    if jax.process_count() == 1:
        return True
    failed = type(error) is ValueError and _FAILED_PROGRAM.match(str(error))
    return isinstance(error, ValueError) and not failed


def ending_together(run: Callable[[], T]) -> T:
    """`run()`. Where it fails in one of several processes, this one ends at once with one message
    and the status `DIED`: the others cannot go on, and most often one of them was the cause."""
    if jax.process_count() == 1:
        return run()
    try:
        return run()
    except BaseException as error:
        mistake = met_by_all(error)
        # JAX's own errors are of a peer that is gone, or of memory: the message says it all.
        if not isinstance(error, EXPECTED):
            traceback.print_exc()
        said = str(error) or type(error).__name__
        lost = (
            "\nIf another process has died, start again with those that are left: with --init_from "
            "resume the data goes on where the last checkpoint was."
        )
        print(
            f"train: process {jax.process_index()} of {jax.process_count()} ends: "
            f"{said if mistake else said.splitlines()[0] + lost}",
            file=sys.stderr,
            flush=True,
        )
        # Not by the interpreter's way out, which waits for the others.
        os._exit(2 if mistake else DIED)
