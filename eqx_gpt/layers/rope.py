"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eqx_gpt.config import LinearScaling, Llama3Scaling, PositionConfig, YarnScaling
from eqx_gpt.ops.angles import cos_and_sin
from eqx_gpt.ops.rounding import rounded


def rotate(
    x: Float[Array, "*batch seq head head_dim"],
    positions: Int[Array, "*#batch seq"],
    config: PositionConfig,
) -> Float[Array, "*batch seq head head_dim"]:
    """Rotate each pair of the first `rope_dim` dimensions by position * its frequency.

    Angles are float32: in bfloat16 the positions beyond 256 would run together.
    """
    head_dim = x.shape[-1]
    rope_dim = head_dim if config.rope_dim is None else config.rope_dim
    frequencies, magnitude = rope_frequencies(config, rope_dim)
    angle = positions.astype(jnp.float32)[..., None, None]
    angle = angle * jnp.broadcast_to(
        jnp.asarray(frequencies), (*angle.shape[:-1], len(frequencies))
    )
    turned = x[..., :rope_dim].astype(jnp.float32)
    if config.rope_pairs == "halves":
        a, b = jnp.split(turned, 2, axis=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
    cos, sin = (jnp.broadcast_to(magnitude * each, a.shape) for each in cos_and_sin(angle))
    pairs = (a * cos - b * sin, b * cos + a * sin)
    if config.rope_pairs == "halves":
        turned = jnp.concatenate(pairs, axis=-1)
    else:
        turned = jnp.stack(pairs, axis=-1).reshape(turned.shape)
    turned = rounded(turned, x.dtype)
    return turned if rope_dim == head_dim else jnp.concatenate([turned, x[..., rope_dim:]], axis=-1)


def rope_frequencies(config: PositionConfig, rope_dim: int) -> tuple[np.ndarray, float]:
    """Radians a position of each pair, float32 of shape (rope_dim / 2), and what to multiply the
    rotated numbers by."""
    # float64 until the end: what the scalings compare lies close together.
    frequency = config.rope_theta ** (-np.arange(0, rope_dim, 2) / rope_dim)
    magnitude = 1.0
    match config.rope_scaling:
        case None:
            pass
        case LinearScaling(factor=factor):
            frequency = frequency / factor
        case Llama3Scaling() as s:
            turns = s.original_block_size * frequency / (2 * math.pi)
            share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            kept = np.clip(share, 0, 1)
            frequency = kept * frequency + (1 - kept) * frequency / s.factor
        case YarnScaling() as s:
            low, high = _yarn_ramp(s, config.rope_theta, rope_dim)
            kept = 1 - np.clip((np.arange(rope_dim // 2) - low) / (high - low), 0, 1)
            frequency = kept * frequency + (1 - kept) * frequency / s.factor
            magnitude = s.attention_factor or max(1.0, 0.1 * math.log(s.factor) + 1)
    return frequency.astype(np.float32), magnitude


def _yarn_ramp(scaling: YarnScaling, theta: float, rope_dim: int) -> tuple[float, float]:
    """The pairs between which stretching sets in: (arXiv:2309.00071, eq. 23), from 0 on."""

    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_block_size / (2 * math.pi * times)
        return rope_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, rope_dim - 1.0)
    return low, high + 0.001 if low == high else high
