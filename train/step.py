"""One optimizer step: a pure function of (windows, state).

Gradients are accumulated over micro-batches in one of two places. On the device, `train_step`
scans over them inside one program. From the host, `add_gradients` runs one micro-batch and
`apply_gradients` ends the step, so that where a step takes many seconds the caller can report and
be interrupted between two of them. Both give the same step, to rounding.
"""

import operator
import warnings
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PyTree

from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT
from eqx_gpt.ops.meshed import by_part, mesh_here
from eqx_gpt.ops.onednn import Products, products_by, stored_if_by
from eqx_gpt.shapes import PRNGKey, Scalar
from train.guard import Guard
from train.loss import next_token_loss
from train.mesh import placed
from train.packing import Packed


class TrainState(eqx.Module):
    """What a step changes and a checkpoint holds, and beside it the parts that stay as they are.

    `params` and `frozen` are the model, each with None for the leaves of the other: gradients and
    the optimizer's moments are those of `params` alone. `step` counts the steps done. `average`,
    if the run keeps one, is an exponential average of `params`.
    """

    params: GPT
    frozen: GPT
    opt_state: PyTree
    step: Int[Array, ""]
    guard: Guard
    average: GPT | None = None

    @staticmethod
    def init(
        model: GPT,
        optimizer: optax.GradientTransformation,
        trainable: PyTree = True,
        *,
        averaged: bool = False,
    ) -> "TrainState":
        """`trainable` is True for the leaves that learn, as `eqx.partition` takes it."""
        params, frozen = eqx.partition(model, trainable)
        opt_state = optimizer.init(params)
        average = jax.tree.map(jnp.copy, params) if averaged else None
        step = jnp.zeros((), jnp.int32)
        return TrainState(params, frozen, opt_state, step, Guard.init(), average)

    @property
    def model(self) -> GPT:
        return eqx.combine(self.params, self.frozen)

    @property
    def best_params(self) -> GPT:
        """What is evaluated and given away of the parts that learn: their average, if kept."""
        return self.params if self.average is None else self.average

    @property
    def best_model(self) -> GPT:
        return eqx.combine(self.best_params, self.frozen)


class Gradients(eqx.Module):
    """Sums over the micro-batches so far."""

    loss: Scalar
    params: GPT
    count: Int[Array, ""]

    @staticmethod
    def zero(params: GPT) -> "Gradients":
        where = _place_of_scalars(params)
        return Gradients(
            jnp.zeros((), jnp.float32, device=where),
            jax.tree.map(jnp.zeros_like, params),
            jnp.zeros((), jnp.int32, device=where),
        )


def _place_of_scalars(params: GPT) -> Sharding | None:
    """Where a program that gets such parameters leaves scalars: one that got them from elsewhere
    would be another program."""
    first = jax.tree.leaves(params)[0]
    if not isinstance(first, jax.Array) or isinstance(first, jax.core.Tracer):
        return None
    if isinstance(first.sharding, NamedSharding):
        return NamedSharding(first.sharding.mesh, PartitionSpec())
    return first.sharding if first.committed else None


class StepMetrics(eqx.Module):
    """Of one step: the loss before it in nats a token, the gradient's norm before clipping, and how
    many steps were not taken so far, in all and in a row up to this one."""

    loss: Scalar
    grad_norm: Scalar
    skipped: Int[Array, ""]
    in_row: Int[Array, ""]


class Recipe(eqx.Module):
    """What stays fixed over a run: the update rule, the dtype of the products, the randomness,
    what the loss trained on adds to the cross-entropy, the weights' average, how many times the
    usual norm of the gradient is a spike, 0 for never, and on a CPU the library of the products.

    Steps with products by oneDNN are for `compile_step` to compile, before the first is called."""

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    dtype: DTypeLike = eqx.field(static=True)
    key: PRNGKey
    z_loss: float = eqx.field(static=True, default=0.0)
    label_smoothing: float = eqx.field(static=True, default=0.0)
    ema_decay: float = eqx.field(static=True, default=0.0)
    skip_spikes: float = eqx.field(static=True, default=0.0)
    products: Products = eqx.field(static=True, default="xla")


def check_windows(windows: Array | Packed, config: GPTConfig, rank: int) -> None:
    """A clear error for a batch that the step cannot take; see `train_step` for the shape."""
    tokens = windows.tokens if isinstance(windows, Packed) else windows
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"a batch must be integers, token ids, got {tokens.dtype}")
    if tokens.ndim != rank:
        raise ValueError(f"a batch must have {rank} dimensions here, got shape {tokens.shape}")
    if tokens.shape[-1] < 2:
        raise ValueError(f"windows of {tokens.shape[-1]} tokens have nothing to predict")
    if tokens.shape[-1] > config.block_size + 1:
        raise ValueError(
            f"windows of {tokens.shape[-1]} tokens exceed block_size + 1 = "
            f"{config.block_size + 1}: the inputs and, one further, the targets"
        )


# By jax.jit, for all that they take is arrays: what `eqx.filter_jit` makes waits for its results at
# each call, and the device for the host.
@partial(jax.jit, donate_argnums=1)
def train_step(
    inputs: tuple[Recipe, Array | Packed], state: TrainState
) -> tuple[TrainState, StepMetrics]:
    """A whole step, still under way when it returns. Donates `state`.

    `windows` hold the inputs and, one further, the targets.

    The loss is the mean over the micro-batches of their means. Of packed documents the weights
    make it that over the tokens learnt, however these spread (see `PackedWindows.batch`).

    **Raises:** TypeError or ValueError for windows of the wrong dtype, rank or length.
    """
    recipe, windows = inputs
    check_windows(windows, state.params.config, rank=3)
    gradients = by_part(_summed, _Basis.of(recipe, state), windows, axis=1)
    return _apply(recipe, gradients, state)


@partial(jax.jit, donate_argnums=1)
def add_gradients(
    inputs: tuple[Recipe, Array | Packed, TrainState], gradients: Gradients
) -> Gradients:
    """Add one micro-batch. Donates `gradients`, which start as `Gradients.zero(state.params)`."""
    recipe, windows, state = inputs
    check_windows(windows, state.params.config, rank=2)
    of_part = partial(_gradients, index=gradients.count)
    return _added(gradients, by_part(of_part, _Basis.of(recipe, state), windows, axis=0))


def apply_gradients(
    recipe: Recipe, gradients: Gradients, state: TrainState
) -> tuple[TrainState, StepMetrics]:
    """End a step with the mean of the gradients added. Donates `state`."""
    return apply_added((recipe, gradients), state)


# Gradients have the shapes of the state: donated, they would be taken for its new arrays, and the
# old ones, which are updated in place otherwise, would be copied.
@partial(jax.jit, donate_argnums=1)
def apply_added(
    inputs: tuple[Recipe, Gradients], state: TrainState
) -> tuple[TrainState, StepMetrics]:
    return _apply(*inputs, state)


def compile_step(
    recipe: Recipe,
    windows: Array | Packed,
    state: TrainState,
    accumulate: Literal["device", "host"],
) -> None:
    """Compile what a step of such windows runs, so that the first one takes no longer than others.

    The windows are those of `train_step`; `accumulate` says by which of the two ways.
    """
    if accumulate == "device":
        _compile(recipe, train_step, (recipe, windows), state)
        return
    micro = jax.tree.map(operator.itemgetter(0), windows)
    gradients = Gradients.zero(state.params)
    _compile(recipe, add_gradients, (recipe, micro, state), gradients)
    _compile(recipe, apply_added, (recipe, gradients), state)


def _compile(recipe: Recipe, function: Any, *arguments: PyTree) -> None:
    """A call with such arguments finds the program that this makes."""
    with warnings.catch_warnings(), stored_if_by(recipe.products):
        # gradients are given up, though nothing takes their place
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        function.lower(*arguments).compile()


@eqx.filter_jit
def eval_step(
    model: GPT, windows: Int[Array, "micro seq_plus_1"] | Packed, dtype: DTypeLike
) -> Scalar:
    """The loss without dropout."""
    return next_token_loss(model, windows, dtype=dtype)


class _Basis(eqx.Module):
    """What gradients depend on beside the windows."""

    recipe: Recipe
    params: GPT
    frozen: GPT
    step: Int[Array, ""]

    @staticmethod
    def of(recipe: Recipe, state: TrainState) -> "_Basis":
        return _Basis(recipe, state.params, state.frozen, state.step)


def _summed(basis: _Basis, windows: Array | Packed) -> Gradients:
    """Over all micro-batches."""

    def add(gradients: Gradients, micro: Array | Packed) -> tuple[Gradients, None]:
        return _added(gradients, _gradients(basis, micro, gradients.count)), None

    if len(jax.tree.leaves(windows)[0]) == 1:
        micro = jax.tree.map(operator.itemgetter(0), windows)
        return _gradients(basis, micro, jnp.zeros((), jnp.int32))
    config = basis.params.config
    if config.unroll < config.n_layer or config.remat != "none" or mesh_here() is not None:
        return lax.scan(add, Gradients.zero(basis.params), windows)[0]
    # Straight code sums each layer's by themselves, and puts them together once.
    params, frozen = basis.params.unstacked(), basis.frozen.unstacked()
    basis = _Basis(basis.recipe, params, frozen, basis.step)
    total = lax.scan(add, Gradients.zero(params), windows)[0]
    return Gradients(total.loss, total.params.stacked(), total.count)


def _added(one: Gradients, other: Gradients) -> Gradients:
    return jax.tree.map(jnp.add, one, other)


def _gradients(basis: _Basis, windows: Array | Packed, index: Array) -> Gradients:
    """Of one micro-batch, the step's `index`-th."""
    recipe, config, key = basis.recipe, basis.params.config, None
    if config.dropout > 0 or config.weights_dropout > 0:
        # A function of (seed, step, micro-batch): nothing random has to be saved.
        key = jax.random.fold_in(jax.random.fold_in(recipe.key, basis.step), index)

    def loss_of(params: GPT) -> Scalar:
        model = eqx.combine(params, basis.frozen)
        return next_token_loss(
            model,
            windows,
            dtype=recipe.dtype,
            key=key,
            z_loss=recipe.z_loss,
            label_smoothing=recipe.label_smoothing,
        )

    with products_by(recipe.products):
        loss, grads = eqx.filter_value_and_grad(loss_of)(basis.params)
    return placed(Gradients(loss, grads, jnp.ones((), jnp.int32)))


def _apply(
    recipe: Recipe, gradients: Gradients, state: TrainState
) -> tuple[TrainState, StepMetrics]:
    count = gradients.count.astype(jnp.float32)
    optimizer = optax.with_extra_args_support(recipe.optimizer)
    n_taken = state.step - state.guard.skipped

    def update(old: tuple[GPT, PyTree, GPT | None]) -> tuple[GPT, PyTree, GPT | None]:
        # By a factor, which XLA takes into the passes that read the gradients.
        share = 1 / count
        grads: Any = jax.tree.map(lambda g: g * share, gradients.params)  # any PyTree;
        params: Any = old[0]  # optax's annotation knows fewer
        updates, opt_state = optimizer.update(grads, old[1], params, norm=norm)
        params = eqx.apply_updates(old[0], updates)
        return params, opt_state, _averaged(recipe.ema_decay, n_taken, old[2], params)

    # Of the sums: the means are in use only within `update`, and are never written out.
    loss, norm = gradients.loss / count, optax.tree.norm(gradients.params) / count
    taken = state.guard.takes(loss, norm, recipe.skip_spikes)
    # Choosing between old and new arrays would keep XLA's CPU backend from updating in place.
    old = (state.params, state.opt_state, state.average)
    params, opt_state, average = lax.cond(taken, update, lambda old: old, old)
    guard = state.guard.after(taken, norm)
    metrics = StepMetrics(loss, norm, guard.skipped, guard.in_row)
    state = TrainState(params, state.frozen, opt_state, state.step + 1, guard, average)
    return placed(state), metrics


def _averaged(decay: float, n_taken: Array, average: GPT | None, params: GPT) -> GPT | None:
    """Of the weights after each step; the first ones count in full."""
    if average is None:
        return None
    kept = jnp.where(n_taken == 0, 0.0, decay)
    return jax.tree.map(lambda a, p: kept * a + (1 - kept) * p, average, params)
