"""Every test runs under strict dtype and rank promotion, with shapes checked by jaxtyping.

The import hook comes from `--jaxtyping-packages` in pyproject.toml, warnings as errors likewise.
"""

import itertools
from collections.abc import Callable

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A new key at each call, the same ones in every run."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))
