"""One block of the decoder: the unit that the stack repeats."""

import math

import equinox as eqx
import jax

from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.layers.attention import Attention
from eqx_gpt.layers.mlp import MLP
from eqx_gpt.layers.norm import Norm
from eqx_gpt.ops.dropout import dropout
from eqx_gpt.shapes import Hidden, PRNGKey


class Block(eqx.Module):
    """Pre-norm residual block of GPT-2.

    x ──┬── norm1 ── attention ── dropout ── + ──┬── norm2 ── mlp ── dropout ── + ──>
        └────────────────────────────────────┘   └──────────────────────────────┘
    """

    norm1: Norm
    attention: Attention
    norm2: Norm
    mlp: MLP
    dropout: float = eqx.field(static=True)

    @staticmethod
    def init(config: GPTConfig, *, key: PRNGKey) -> "Block":
        """Weights from N(0, 0.02²), those that write to the residual stream from
        N(0, 0.02² / (2 n_layer)), so that its variance does not grow with depth (GPT-2, §2.3).
        """
        key_attention, key_mlp = jax.random.split(key)
        std, out_std = 0.02, 0.02 / math.sqrt(2 * config.n_layer)
        return Block(
            Norm.init(config.norm, config.n_embd),
            Attention.init(config, std=std, out_std=out_std, key=key_attention),
            Norm.init(config.norm, config.n_embd),
            MLP.init(config, std=std, out_std=out_std, key=key_mlp),
            config.dropout,
        )

    def __call__(
        self,
        x: Hidden,
        *,
        cache: KVCache | None = None,
        layer: int | jax.Array = 0,
        key: PRNGKey | None = None,
    ) -> tuple[Hidden, KVCache | None]:
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        attended, cache = self.attention(self.norm1(x), cache=cache, layer=layer, key=keys[0])
        x = x + dropout(attended, self.dropout, keys[1])
        return x + dropout(self.mlp(self.norm2(x)), self.dropout, keys[2]), cache
