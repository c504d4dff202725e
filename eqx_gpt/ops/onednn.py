"""Products by oneDNN, which jaxlib brings along: with AMX the fastest of a CPU.

XLA's own library packs one operand anew at each product and leaves results in float32; oneDNN's
takes a fifth to two fifths less time, adds the bias and rounds as it writes. XLA has it as a custom
call, the one that its pass for oneDNN makes, which three things keep from being everybody's:

- XLA cannot store a program with such a call: it takes it for one of another kind. So it is for
  those who ask, by `products_by`, and compile within `stored_if_by`.
- The call's name and its fields are XLA's own, and of a wrong field a process dies. So it is for
  the versions of jaxlib that it was tried with.
- Nothing splits it over a mesh.
"""

import json
import math
import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Products = Literal["xla", "onednn"]

TRIED = ("0.10", "0.11", "0.12")  # versions of jaxlib, see `tests/test_onednn.py`

_TARGET = "__onednn$matmul"
_FEWEST = 2**24  # multiplications, below which a call takes longer than its work
_CACHE, _FROM_SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"

# One that jax knows, so that what it has traced for one library it does not take for the other.
_products: Any = jax.make_user_context("xla")


def products_by(library: Products) -> AbstractContextManager[None]:
    """Linear maps of bfloat16 that are traced within are by this library on CPUs, if they are large
    enough. For oneDNN see `refusal`."""
    return _products(library)


def refusal(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Why this process has no such products, or None."""
    jaxlib = version("jaxlib")
    if ".".join(jaxlib.split(".")[:2]) not in TRIED:
        return f"they were tried with jaxlib {', '.join(TRIED)}, and this is {jaxlib}"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they are for x86-64 Linux, and this is {platform.machine()} {platform.system()}"
    if jax.default_backend() != "cpu":
        return f"they are for CPUs, and this process computes on {jax.default_backend()}"
    try:
        found = re.search(r"\bamx_bf16\b", cpuinfo.read_text(errors="replace"))
    except OSError:
        found = None
    return None if found else "they are for CPUs with AMX, which this one has not"


@contextmanager
def stored_if_by(library: Products) -> Iterator[None]:
    """Programs with products by oneDNN that are compiled within go to no persistent cache."""
    if library == "xla":
        yield
        return
    before = getattr(jax.config, _FROM_SECONDS)
    jax.config.update(_FROM_SECONDS, math.inf)
    try:
        yield
    finally:
        jax.config.update(_FROM_SECONDS, before)


def takes(a: Array, b: Array, n: int) -> bool:
    """Whether oneDNN is asked for, and fit for a product of the rows of `a` with the matrix `b`
    that has `n` columns.

    **Raises:** RuntimeError if the program that is traced would be stored.
    """
    if _products.value != "onednn" or a.dtype != jnp.bfloat16 or b.dtype == jnp.int8:
        return False
    if a.size * n < _FEWEST:
        return False
    if getattr(jax.config, _CACHE) and getattr(jax.config, _FROM_SECONDS) != math.inf:
        raise RuntimeError(
            f"a program with products by oneDNN cannot be kept in {getattr(jax.config, _CACHE)}: "
            "compile it within eqx_gpt.ops.onednn.stored_if_by('onednn')"
        )
    return True


def product(
    a: Float[Array, "m k"],
    b: Float[Array, "k n"] | Float[Array, "n k"],
    bias: Float[Array, "1 n"] | None = None,
    *,
    transposed: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "m n"]:
    """`a @ b`, or `a @ b.T`, plus `bias`, of bfloat16, summed in float32 and rounded once. In
    programs for CPUs alone."""
    fields: dict[str, Any] = {"transpose_b": transposed}
    if bias is not None:
        fields["fusions"] = {"ops": ["BIAS"]}
    call = jax.ffi.ffi_call(
        _TARGET,
        jax.ShapeDtypeStruct((a.shape[0], b.shape[0 if transposed else 1]), dtype),
        vmap_method="sequential",
        custom_call_api_version=1,  # XLA reads the fields itself
        legacy_backend_config=json.dumps({"onednn_matmul_config": fields}),
    )
    return call(a, b) if bias is None else call(a, b, bias)
