"""The one place where an operation chooses between a CPU's arrangement and the plain one."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax
from jaxtyping import Array, PyTree, Shaped

T = TypeVar("T")


def by_platform(*args: Array | None, cpu: Callable[..., T], default: Callable[..., T]) -> T:
    """`cpu(*args)` in programs lowered for CPUs, `default(*args)` in all others.

    Both are traced; the choice is made when the program is lowered, so a program that is exported
    for another platform than this process runs on is right too.
    """
    return lax.platform_dependent(*args, cpu=cpu, default=default)


def stored(x: Array) -> Array:
    """`x`, on CPUs written to memory once instead of made anew at each use."""
    return by_platform(x, cpu=lax.optimization_barrier, default=lambda x: x)


def apart(tree: PyTree) -> PyTree:
    """The same numbers, of which CPUs make anew what has been made of `tree` already.

    What two results need in common XLA's CPU backend writes to memory, and makes each of them in a
    loop of its own. If all they share is what they read, one loop makes both, and finds the common
    part by itself.
    """

    def each(*leaves: Array) -> tuple[Array, ...]:
        return tuple(lax.optimization_barrier(x) for x in leaves)

    # One choice for all leaves: each takes a millisecond of a start.
    leaves, structure = jax.tree.flatten(tree)
    leaves = by_platform(*leaves, cpu=each, default=lambda *leaves: leaves)
    return jax.tree.unflatten(structure, leaves)


def laid_out(x: Shaped[Array, "*batch m n"]) -> Shaped[Array, "*batch m n"]:
    """`x`, row-major on CPUs whatever made it, if one of the two dimensions is even.

    It stands behind a barrier that sees it in another shape: of that, XLA cannot choose the layout
    by looking at what `x` was transposed from.
    """
    *batch, m, n = x.shape
    if m % 2 == 0:
        seen = (*batch, 2, m // 2, n)
    elif n % 2 == 0:
        seen = (*batch, m, 2, n // 2)
    else:
        return x
    return lax.optimization_barrier(x.reshape(seen)).reshape(x.shape)
