"""What the model should compute, in float64 NumPy from the formulas; one sequence at a time."""

import math
from collections.abc import Mapping

import numpy as np

from eqx_gpt.config import GPTConfig, NormConfig

F64 = np.ndarray

ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def norm(config: NormConfig, x: F64, weight: F64, bias: F64 | None) -> F64:
    if config.kind == "layernorm":
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt(x.var(-1, keepdims=True) + config.eps)
    else:
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps)
    return y * weight + (0 if bias is None else bias)


def rotate(x: F64, positions: F64, theta: float) -> F64:
    """(seq, head, head_dim): the halves are the real and imaginary parts of numbers to turn."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    frequency = np.array([theta ** (-2 * i / x.shape[-1]) for i in range(half)])
    z = z * np.exp(1j * positions[:, None, None] * frequency)
    return np.concatenate([z.real, z.imag], -1)


def attention(q: F64, k: F64, v: F64, offset: int = 0) -> F64:
    """(seq, head, head_dim), (cache, kv_head, head_dim) -> (seq, head, head_dim)."""
    out = np.zeros(q.shape)
    for i, h in np.ndindex(q.shape[:2]):
        weights, group, end = _weights(q, k, offset, i, h)
        out[i, h] = weights @ v[:end, group]
    return out


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


def cross_entropy(hidden: F64, weight: F64, targets: np.ndarray) -> tuple[float, F64, F64]:
    """(tokens, d_model), (vocab, d_model), (tokens,) -> the mean loss and its two gradients."""
    logits = hidden @ weight.T
    top = logits.max(-1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    rows = np.arange(len(targets))
    loss = float((log_sum - logits[rows, targets]).mean())
    d_logits = softmax(logits)
    d_logits[rows, targets] -= 1
    d_logits /= len(targets)
    return loss, d_logits @ weight, d_logits.T @ hidden


def gpt(config: GPTConfig, arrays: Mapping[str, np.ndarray], tokens: np.ndarray) -> F64:
    """Logits (seq, vocab) of tokens (seq,), given the arrays of `named_arrays`."""
    arrays = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    seq, width = len(tokens), config.head_dim
    n_q, n_kv = config.n_head, config.n_kv_head
    positions = np.arange(seq)

    def linear(name: str, x: F64, layer: int) -> F64:
        y = x @ arrays[f"blocks.{name}.weight"][layer].T
        bias = arrays.get(f"blocks.{name}.bias")
        return y if bias is None else y + bias[layer]

    def block_norm(name: str, x: F64, layer: int) -> F64:
        bias = arrays.get(f"blocks.{name}.bias")
        weight = arrays[f"blocks.{name}.weight"][layer]
        return norm(config.norm, x, weight, None if bias is None else bias[layer])

    x = arrays["wte.weight"][tokens]
    if config.position.kind == "learned":
        x = x + arrays["wpe.weight"][positions]
    for layer in range(config.n_layer):
        heads = linear("attention.qkv", block_norm("norm1", x, layer), layer)
        heads = heads.reshape(seq, n_q + 2 * n_kv, width)
        q, k, v = heads[:, :n_q], heads[:, n_q : n_q + n_kv], heads[:, n_q + n_kv :]
        if config.position.kind == "rope":
            q = rotate(q, positions, config.position.rope_theta)
            k = rotate(k, positions, config.position.rope_theta)
        x = x + linear("attention.out", attention(q, k, v).reshape(seq, n_q * width), layer)
        y = block_norm("norm2", x, layer)
        act = ACTIVATIONS[config.mlp.activation]
        inner = linear("mlp.up", y, layer)
        gated = config.mlp.kind == "gated"
        inner = act(linear("mlp.gate", y, layer)) * inner if gated else act(inner)
        x = x + linear("mlp.down", inner, layer)
    x = norm(config.norm, x, arrays["norm.weight"], arrays.get("norm.bias"))
    head = arrays["wte.weight" if config.head == "tied" else "head.weight"]
    return x @ head.T
