"""Every test runs under strict dtype and rank promotion, with shapes checked by jaxtyping.

The import hook comes from `--jaxtyping-packages` in pyproject.toml, warnings as errors likewise.
"""

import atexit
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator

# Whole runs compile the same small programs again and again, in processes of their own too.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.mkdtemp(prefix="eqx_gpt_tests_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
else:  # one each: a reader may find what another process has only half written
    os.environ["JAX_COMPILATION_CACHE_DIR"] += "/" + os.environ["PYTEST_XDIST_WORKER"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax
import pytest

# A shell starts background jobs with Ctrl-C ignored, and commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Thousands of compiled programs in a process reach the kernel's limit of mappings."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For small models: compiling takes the time there, not running."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A new key at each call, the same ones in every run."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))
