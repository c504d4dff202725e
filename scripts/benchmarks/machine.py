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
SECONDS = 0.5  # of each measurement, of which the best repetition counts
READ_BYTES = 512 * 2**20  # many times any cache


def prepare(job: Job, settings: dict[str, Any]) -> Prepared:
    """Everything is measured here; there are no rounds."""
    facts = {
        "float32_flops": max(_product(shape, jnp.float32) for shape in SHAPES),
        "bfloat16_flops": max(_product(shape, jnp.bfloat16) for shape in SHAPES),
        "read_bytes_per_s": max(_read(jnp.float32), _read(jnp.bfloat16)),
    }
    return Prepared(lambda n: (1e-9, 0.0), facts)


def _product(shape: tuple[int, int, int], dtype: Any) -> float:
    """FLOP/s of the product in its canonical form, with a float32 result."""
    rows, inner, columns = shape
    a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
    contract = (((1,), (0,)), ((), ()))
    dot = jax.jit(lambda a, b: lax.dot_general(a, b, contract, preferred_element_type=jnp.float32))
    return 2 * rows * inner * columns / _best(lambda: dot(a, b))


def _read(dtype: Any) -> float:
    """Bytes a second of a matrix that is multiplied with one vector."""
    columns = 2048
    rows = READ_BYTES // columns // jnp.dtype(dtype).itemsize
    matrix, vector = jnp.ones((rows, columns), dtype), jnp.ones((1, columns), dtype)

    @jax.jit
    def multiply(vector: Array, matrix: Array) -> Array:
        vector, matrix = vector.astype(jnp.float32), matrix.astype(jnp.float32)
        return lax.dot_general(vector, matrix, (((1,), (1,)), ((), ())))

    return matrix.nbytes / _best(lambda: multiply(vector, matrix))


def _best(work: Callable[[], Array]) -> float:
    """Seconds of the best repetition, compiled and warm."""
    work().block_until_ready()
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work().block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
