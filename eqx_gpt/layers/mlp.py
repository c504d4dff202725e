"""The feed-forward half of a block, plain or gated."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import equinox as eqx
import jax
from jaxtyping import Array, Float

from eqx_gpt.config import GPTConfig
from eqx_gpt.layers.linear import Linear
from eqx_gpt.shapes import Hidden, PRNGKey

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class MLP(eqx.Module):
    """down(act(up(x))), or with a gate, down(act(gate(x)) * up(x))."""

    up: Linear
    gate: Linear | None
    down: Linear
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = eqx.field(static=True)

    @staticmethod
    def init(config: GPTConfig, *, std: float, out_std: float, key: PRNGKey) -> "MLP":
        key_up, key_gate, key_down = jax.random.split(key, 3)
        n_embd, n_inner, bias = config.n_embd, config.n_inner, config.mlp.bias
        gated = config.mlp.kind == "gated"
        return MLP(
            Linear.init(n_embd, n_inner, bias=bias, std=std, key=key_up),
            Linear.init(n_embd, n_inner, bias=bias, std=std, key=key_gate) if gated else None,
            Linear.init(n_inner, n_embd, bias=bias, std=out_std, key=key_down),
            config.mlp.activation,
        )

    def __call__(self, x: Hidden) -> Hidden:
        return self.down(self._inner(x))

    def _inner(self, x: Hidden) -> Float[Array, "*batch seq d_ff"]:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return act(self.up(x))
        return act(self.gate(x)) * self.up(x)
