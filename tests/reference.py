"""What the model should compute, in float64 NumPy from the formulas; one sequence at a time."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from eqx_gpt.config import GPTConfig, NormConfig, PositionConfig

F64 = np.ndarray
Tap = Callable[[str, F64], F64]


def no_tap(_: str, value: F64) -> F64:
    return value


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def norm(config: NormConfig, x: F64, weight: F64 | None, bias: F64 | None) -> F64:
    if config.kind == "layernorm":
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt(x.var(-1, keepdims=True) + config.eps)
    else:
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps)
    if config.scale == "one_plus_weight":
        return y * (1 + weight)
    return y if weight is None else y * weight + (0 if bias is None else bias)


def rotate(x: F64, positions: F64, config: PositionConfig) -> F64:
    """(seq, head, head_dim): each pair is the real and imaginary part of a number to turn."""
    dim = config.rope_dim or x.shape[-1]
    turned, kept = x[..., :dim], x[..., dim:]
    if config.rope_pairs == "neighbours":
        z = turned[..., ::2] + 1j * turned[..., 1::2]
    else:
        z = turned[..., : dim // 2] + 1j * turned[..., dim // 2 :]
    frequency, magnitude = zip(*(_frequency(config, i, dim) for i in range(dim // 2)), strict=True)
    z = z * magnitude * np.exp(1j * positions[:, None, None] * frequency)
    if config.rope_pairs == "neighbours":
        turned = np.stack([z.real, z.imag], -1).reshape(turned.shape)
    else:
        turned = np.concatenate([z.real, z.imag], -1)
    return np.concatenate([turned, kept], -1)


def _frequency(config: PositionConfig, i: int, dim: int) -> tuple[float, float]:
    """Of the i-th pair: radians a position, and the factor of its length."""
    theta, scaling = config.rope_theta, config.rope_scaling
    plain = theta ** (-2 * i / dim)
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    length = scaling.original_block_size
    if scaling.kind == "llama3":  # as in the reference code of Llama 3.1, apply_scaling
        wavelength = 2 * math.pi / plain
        if wavelength < length / scaling.high_freq_factor:
            return plain, 1.0
        if wavelength > length / scaling.low_freq_factor:
            return plain / scaling.factor, 1.0
        smooth = (length / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        return (1 - smooth) * plain / scaling.factor + smooth * plain, 1.0

    def pair(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = min(max((i - low) / (high - low if high > low else 0.001), 0), 1)
    magnitude = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return (1 - ramp) * plain + ramp * plain / scaling.factor, magnitude


def attention(
    q: F64,
    k: F64,
    v: F64,
    offset: int = 0,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    tap: Tap = no_tap,
) -> F64:
    """(seq, head, head_dim), (cache, kv_head, head_dim) -> (seq, head, head_dim)."""
    scores = np.full((q.shape[1], len(q), len(k)), -np.inf)
    for i, h in np.ndindex(q.shape[:2]):
        group, end = h // (q.shape[1] // k.shape[1]), min(offset + i + 1, len(k))
        start = 0 if window is None else max(0, offset + i + 1 - window)
        seen = k[start:end, group] @ q[i, h] * (scale or q.shape[-1] ** -0.5)
        scores[h, i, start:end] = seen if softcap is None else softcap * np.tanh(seen / softcap)
    weights = tap("attention.weights", softmax(tap("attention.scores", scores)))
    out = np.zeros(q.shape)
    for i, h in np.ndindex(q.shape[:2]):
        out[i, h] = weights[h, i] @ v[:, h // (q.shape[1] // k.shape[1])]
    return tap("attention.heads", out)


def attention_gradients(q: F64, k: F64, v: F64, g: F64, offset: int = 0) -> tuple[F64, F64, F64]:
    """The gradients of sum(attention(q, k, v) * g)."""
    d_q, d_k, d_v = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for i, h in np.ndindex(q.shape[:2]):
        weights, group, end = _weights(q, k, offset, i, h)
        d_weights = v[:end, group] @ g[i, h]
        d_scores = weights * (d_weights - weights @ d_weights) / math.sqrt(q.shape[-1])
        d_q[i, h] = d_scores @ k[:end, group]
        d_k[:end, group] += np.outer(d_scores, q[i, h])
        d_v[:end, group] += np.outer(weights, g[i, h])
    return d_q, d_k, d_v


def _weights(q: F64, k: F64, offset: int, i: int, h: int) -> tuple[F64, int, int]:
    """Of query i in head h: its softmax, its key-value head, how many positions it sees."""
    group, end = h // (q.shape[1] // k.shape[1]), min(offset + i + 1, len(k))
    scores = k[:end, group] @ q[i, h] / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max())
    return weights / weights.sum(), group, end


def softmax(x: F64) -> F64:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def head_logits(hidden: F64, weight: F64, bias: F64 | None, softcap: float | None) -> F64:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return logits if softcap is None else softcap * np.tanh(logits / softcap)


def cross_entropy(
    hidden: F64,
    weight: F64,
    targets: np.ndarray,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[float, F64, F64]:
    """(tokens, d_model), (vocab, d_model), (tokens,) -> the mean loss and its two gradients."""
    logits = hidden @ weight.T
    top = logits.max(-1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    rows = np.arange(len(targets))
    expected = np.full(logits.shape, label_smoothing / len(weight))
    expected[rows, targets] += 1 - label_smoothing
    loss = float((log_sum - (expected * logits).sum(-1) + z_loss * log_sum**2).mean())
    d_logits = softmax(logits) * (1 + 2 * z_loss * log_sum[:, None]) - expected
    d_logits /= len(targets)
    return loss, d_logits @ weight, d_logits.T @ hidden


def gpt(
    config: GPTConfig, arrays: Mapping[str, np.ndarray], tokens: np.ndarray, tap: Tap = no_tap
) -> F64:
    """Logits (seq, vocab) of tokens (seq,), given the arrays of `named_arrays`.

    `tap` sees every activation by its name, and may change it.
    """
    arrays = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    seq, width = len(tokens), config.head_dim
    n_q, n_kv = config.n_head, config.n_kv_head
    positions = np.arange(seq)

    def linear(name: str, x: F64, layer: int) -> F64:
        y = x @ arrays[f"blocks.{name}.weight"][layer].T
        bias = arrays.get(f"blocks.{name}.bias")
        return y if bias is None else y + bias[layer]

    def block_norm(name: str, x: F64, layer: int) -> F64:
        """Of x if the block has no such norm."""
        weight, bias = (arrays.get(f"blocks.{name}.{part}") for part in ("weight", "bias"))
        if weight is None and not (config.norm.scale == "none" and name in norms):
            return x
        weight, bias = (None if p is None else p[layer] for p in (weight, bias))
        return norm(config.norm, x, weight, bias)

    norms = {  # which of its norms a block has, where they have no weights to show it
        "pre_norm": ("norm1", "norm2"),
        "post_norm": ("post_norm1", "post_norm2"),
        "sandwich": ("norm1", "post_norm1", "norm2", "post_norm2"),
        "parallel": ("norm1", "norm2"),
        "parallel_shared_norm": ("norm1",),
    }[config.residual]
    x = arrays["wte.weight"][tokens]
    if config.embedding_scale == "sqrt_n_embd":
        x = x * math.sqrt(config.n_embd)
    x = tap("embedding", x)
    if config.position.kind == "learned":
        x = x + tap("positions", arrays["wpe.weight"][config.position.offset + positions])
    for layer in range(config.n_layer):
        kind = config.layers[layer % len(config.layers)]
        position = kind.position or config.position

        def of_block(site: str, value: F64, layer: int = layer) -> F64:
            return tap(f"blocks.{layer}.{site}", value)

        x = of_block("input", x)
        normed = block_norm("norm1", x, layer)
        heads = linear("attention.qkv", of_block("attention.input", normed), layer)
        if config.attention.clip_qkv is not None:
            heads = np.clip(heads, -config.attention.clip_qkv, config.attention.clip_qkv)
        heads = heads.reshape(seq, n_q + 2 * n_kv, width)
        q, k, v = heads[:, :n_q], heads[:, n_q : n_q + n_kv], heads[:, n_q + n_kv :]
        if config.attention.qk_norm == "all_heads":
            q = block_norm("attention.q_norm", q.reshape(seq, -1), layer).reshape(q.shape)
            k = block_norm("attention.k_norm", k.reshape(seq, -1), layer).reshape(k.shape)
        elif config.attention.qk_norm == "head":
            q = block_norm("attention.q_norm", q, layer)
            k = block_norm("attention.k_norm", k, layer)
        if position.kind == "rope":
            q, k = rotate(q, positions, position), rotate(k, positions, position)
        q, k = of_block("attention.q", q), of_block("attention.k", k)
        v, parts = of_block("attention.v", v), config.attention
        mixed = attention(q, k, v, 0, kind.window, parts.scale, parts.softcap, of_block)
        attended = linear("attention.out", mixed.reshape(seq, n_q * width), layer)
        attended = of_block("attention.output", block_norm("post_norm1", attended, layer))
        after = of_block("middle", x + attended)
        y = {"parallel": x, "parallel_shared_norm": normed}.get(config.residual, after)
        y = of_block("mlp.input", block_norm("norm2", y, layer))
        act = ACTIVATIONS[config.mlp.activation]
        inner = linear("mlp.up", y, layer)
        gated = config.mlp.kind == "gated"
        inner = act(linear("mlp.gate", y, layer)) * inner if gated else act(inner)
        fed = linear("mlp.down", of_block("mlp.inner", inner), layer)
        x = of_block("output", after + of_block("mlp.output", block_norm("post_norm2", fed, layer)))
    x = tap("norm", norm(config.norm, x, arrays.get("norm.weight"), arrays.get("norm.bias")))
    head = arrays["wte.weight" if config.head == "tied" else "head.weight"]
    return tap("logits", head_logits(x, head, arrays.get("head.bias"), config.logit_softcap))
