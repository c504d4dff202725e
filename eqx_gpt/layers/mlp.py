"""The feed-forward half of a block, plain or gated."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from eqx_gpt.config import GPTConfig
from eqx_gpt.layers.linear import Linear
from eqx_gpt.ops.activation import Activation, activate, activate_gated
from eqx_gpt.shapes import Hidden, PRNGKey
from eqx_gpt.tap import NO_TAP, Tap


class MLP(eqx.Module):
    """down(act(up(x))), or with a gate, down(act(gate(x)) * up(x))."""

    up: Linear
    gate: Linear | None
    down: Linear
    activation: Activation = eqx.field(static=True)

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

    def __call__(self, x: Hidden, *, tap: Tap = NO_TAP) -> Hidden:
        return self.down(tap("mlp.inner", self._inner(x)))

    def _inner(self, x: Hidden) -> Float[Array, "*batch seq d_ff"]:
        if self.gate is None:
            return activate(self.up(x), self.activation)
        return activate_gated(self.gate(x), self.up(x), self.activation)
