"""The ceilings of this machine, measured: matrix products, and reading memory."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from scripts.benchmarks.job import Job
from scripts.benchmarks.serve import Prepared

# (rows, inner, columns): large enough to hide what starting a product costs.
SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 768, 3072), (4096, 1024, 4096))
LARGE_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192))  # an accelerator's
SECONDS = 0.5  # of each measurement, of which the best repetition counts
READ_BYTES = 512 * 2**20  # many times any cache
LARGE_READ_BYTES = 2**30
IN_A_ROW = 20  # what an accelerator is given at once, so that it does not wait for the host


def prepare(job: Job, settings: dict[str, Any]) -> Prepared:
    """Everything is measured here; there are no rounds."""
    shapes = SHAPES if _on_cpu() else LARGE_SHAPES
    facts = {
        "float32_flops": max(_product(shape, jnp.float32) for shape in shapes),
        "bfloat16_flops": max(_product(shape, jnp.bfloat16) for shape in shapes),
        "read_bytes_per_s": max(_read(jnp.float32), _read(jnp.bfloat16)),
    }
    return Prepared(lambda n: (1e-9, 0.0), facts)


def _product(shape: tuple[int, int, int], dtype: Any) -> float:
    """FLOP/s of the product in its canonical form, with a float32 result."""
    rows, inner, columns = shape
    # Random numbers: some chips multiply ones faster, as fewer of their bits change.
    a, b = _random((rows, inner), dtype), _random((inner, columns), dtype)
    contract = (((1,), (0,)), ((), ()))
    dot = jax.jit(lambda a, b: lax.dot_general(a, b, contract, preferred_element_type=jnp.float32))
    return 2 * rows * inner * columns / _best(lambda: dot(a, b))


def _read(dtype: Any) -> float:
    """Bytes a second of a matrix that is multiplied with one vector."""
    columns = 2048
    n_bytes = READ_BYTES if _on_cpu() else LARGE_READ_BYTES
    rows = n_bytes // columns // jnp.dtype(dtype).itemsize
    matrix, vector = jnp.ones((rows, columns), dtype), jnp.ones((1, columns), dtype)

    @jax.jit
    def multiply(vector: Array, matrix: Array) -> Array:
        vector, matrix = vector.astype(jnp.float32), matrix.astype(jnp.float32)
        return lax.dot_general(vector, matrix, (((1,), (1,)), ((), ())))

    return matrix.nbytes / _best(lambda: multiply(vector, matrix))


def _best(work: Callable[[], Array]) -> float:
    """Seconds of the best repetition, compiled and warm."""
    work().block_until_ready()
    in_a_row = 1 if _on_cpu() else IN_A_ROW
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(in_a_row - 1):
            work()
        work().block_until_ready()
        times.append((time.perf_counter() - start) / in_a_row)
    return min(times)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _random(shape: tuple[int, int], dtype: Any) -> Array:
    return jax.random.normal(jax.random.key(0), shape, dtype)
