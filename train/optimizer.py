"""What learns and how: frozen parts, and the update rules a config can name, from optax.

Every rule is one stage of the same chain: clipping, the rule, decoupled weight decay, the
learning rate. The last two know each array's name.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from eqx_gpt import lora
from eqx_gpt.ops.platform import apart
from eqx_gpt.shapes import Scalar
from eqx_gpt.tree import map_with_roles, matching, name_of, named_arrays
from train.config import OptimizerName, TrainConfig
from train.muon import scale_by_muon
from train.schedules import learning_rate

MUON_DTYPE = jnp.bfloat16  # of Newton-Schulz' products


def trainable(config: TrainConfig, model: PyTree) -> PyTree:
    """True for the leaves of the model that learn, False for the frozen ones.

    ValueError if a pattern of `config.freeze` fits nothing, or if they leave nothing to learn.
    """
    if config.lora_rank:
        return lora.trainable(model)
    names = list(named_arrays(model))
    try:
        frozen = set(matching(names, config.freeze)) if config.freeze else set()
    except ValueError as error:
        raise ValueError(f"freeze: {error}") from None
    if len(frozen) == len(names):
        raise ValueError(f"freeze={config.freeze!r} fits every array; leave something to learn")
    return jax.tree_util.tree_map_with_path(lambda path, _: name_of(path) not in frozen, model)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Gradients -> what to add to the parameters; see `RULES`.

    All decays but biases and norms, as AdamW's (arXiv:1711.05101), by the learning rate times
    `weight_decay`; `decay_scale` and `lr_scale` change that by name.

    Whoever knows the gradient's global norm may give it to `update` as `norm`.

    **Raises:** ValueError, at `init`, if a pattern of those fits nothing.
    """
    clip = optax.identity() if config.grad_clip == 0 else clip_by_norm(config.grad_clip)
    rule = RULES[config.optimizer](config)
    if config.moment_dtype == "bfloat16":
        rule = kept_in(rule, jnp.bfloat16)
    schedule = optax.scale_by_learning_rate(learning_rate(config))
    optimizer = optax.chain(clip, optax.chain(rule, _decay(config), schedule, _by_name(config)))
    if config.optimizer == "adamw" and config.moment_dtype == "float32" and _loops_end_in_several():
        optimizer = _in_one_loop(optimizer)

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        # optax multiplies floats by its int32 count of steps.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, but that who knows the global norm may give it as `norm`."""

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        norm: Scalar | None = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.OptState]:
        size = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.where(size < limit, 1.0, limit / size)
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _adam(config: TrainConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2)


def _muon(config: TrainConfig) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, Adam for embeddings, head and vectors."""

    def rules(params: PyTree) -> PyTree:
        in_blocks = jax.tree_util.tree_map_with_path(
            lambda path, _: name_of(path).startswith("blocks."), params
        )
        return jax.tree.map(
            lambda role, inside: "muon" if inside and role == "weight" else "adam",
            map_with_roles(lambda role, _: role, params),
            in_blocks,
        )

    # Both follow one schedule, the learning rate's; Muon has a peak of its own.
    ratio = config.muon_learning_rate / config.learning_rate
    muon = optax.chain(scale_by_muon(config.muon_beta, dtype=MUON_DTYPE), optax.scale(ratio))
    return optax.partition({"muon": muon, "adam": _adam(config)}, rules)


def _lion(config: TrainConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.beta1, config.beta2)


def _adafactor(config: TrainConfig) -> optax.GradientTransformation:
    """Without momentum, relative steps or scaling by the parameters' size."""
    rule = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.clip_by_block_rms(1.0)
    )

    def places(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "blocks" if name_of(path).startswith("blocks.") else "rest", params
        )

    return optax.partition({"blocks": of_each_layer(rule), "rest": rule}, places)


# Name -> rule, from arXiv:1412.6980 (Adam), "Muon" (train/muon.py), arXiv:2302.06675 (Lion),
# arXiv:1804.04235 (Adafactor).
RULES: dict[OptimizerName, Callable[[TrainConfig], optax.GradientTransformation]] = {
    "adamw": _adam,
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
}


def _loops_end_in_several() -> bool:
    """Whether a loop of XLA's CPU backend may have several results, as commands ask for
    (`scripts/xla_loops.py`)."""
    return "xla_cpu_use_multi_output_fusion=true" in os.environ.get("XLA_FLAGS", "")


def _in_one_loop(
    adamw: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The changes and each of the moments computed apart (`eqx_gpt/ops/platform.py`), so that on
    CPUs one loop makes all of them and reads gradients, moments and parameters once. Of three
    loops the last would need moments that the first has overwritten: they would be copied."""

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        _, with_mu = adamw.update(updates, state, params, **extra)
        updates, state = apart((updates, state))
        changes, _ = adamw.update(updates, state, params, **extra)
        updates, state = apart((updates, state))
        _, with_nu = adamw.update(updates, state, params, **extra)
        return changes, jax.tree_util.tree_map_with_path(
            lambda path, mu, nu: nu if jax.tree_util.GetAttrKey("nu") in path else mu,
            with_mu,
            with_nu,
        )

    return optax.GradientTransformationExtraArgs(adamw.init, update)


def of_each_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule that looks at an array as a whole, applied to each layer of stacked ones."""

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.OptState]:
        return jax.vmap(rule.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(rule.init), update)


def kept_in(
    rule: optax.GradientTransformation, dtype: jax.typing.DTypeLike
) -> optax.GradientTransformation:
    """A rule whose state is kept in `dtype` between steps, and computed with in float32."""

    def cast(state: PyTree, to: jax.typing.DTypeLike) -> PyTree:
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(to) if is_float(x) else x, state)

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.OptState]:
        updates, state = rule.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(rule.init(params), dtype), update)


def factors(names: list[str], scales: str, field: str) -> Mapping[str, float]:
    """Name -> factor, of those that `pattern=factor,pattern=factor` names; the last that fits wins.

    ValueError, naming `field`, for what cannot be read or fits nothing.
    """
    found = {}
    for part in scales.split(","):
        pattern, equals, factor = (piece.strip() for piece in part.rpartition("="))
        try:
            value = float(factor) if equals else -1.0
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ValueError(
                f"{field}: expected pattern=factor, a factor of 0 or above, got {part.strip()!r}"
            )
        try:
            found |= dict.fromkeys(matching(names, pattern), value)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    return found


def _decay(config: TrainConfig) -> optax.GradientTransformation:
    def factor(role: str) -> float:
        return float(role in ("weight", "lora", "embedding"))

    def decayed(updates: PyTree, params: PyTree) -> PyTree:
        by_role = map_with_roles(lambda role, _: factor(role), params)
        scales = _scales(params, config.decay_scale, "decay_scale", by_role)
        return jax.tree.map(
            lambda u, p, scale: u + config.weight_decay * scale * p if scale else u,
            updates,
            params,
            scales,
        )

    return _stateless(config.decay_scale, "decay_scale", decayed)


def _by_name(config: TrainConfig) -> optax.GradientTransformation:
    def scaled(updates: PyTree, params: PyTree) -> PyTree:
        ones = jax.tree.map(lambda _: 1.0, params)
        scales = _scales(params, config.lr_scale, "lr_scale", ones)
        return jax.tree.map(lambda u, scale: u if scale == 1 else scale * u, updates, scales)

    return _stateless(config.lr_scale, "lr_scale", scaled)


def _scales(params: PyTree, scales: str, field: str, otherwise: PyTree) -> PyTree:
    named = factors(list(named_arrays(params)), scales, field) if scales else {}
    return jax.tree_util.tree_map_with_path(
        lambda path, factor: named.get(name_of(path), factor), otherwise
    )


def _stateless(
    scales: str, field: str, fn: Callable[[PyTree, PyTree], PyTree]
) -> optax.GradientTransformation:
    def init(params: PyTree) -> optax.EmptyState:
        if scales:
            factors(list(named_arrays(params)), scales, field)
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.OptState, params: Any = None) -> tuple[PyTree, Any]:
        return fn(updates, params), state

    return optax.GradientTransformation(init, update)
