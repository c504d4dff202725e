"""One block of the decoder: the unit that the stack repeats."""

import math

import equinox as eqx
import jax
from jaxtyping import Array, Int

from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.layers.attention import Attention
from eqx_gpt.layers.mlp import MLP
from eqx_gpt.layers.norm import Norm
from eqx_gpt.ops.dropout import dropout
from eqx_gpt.ops.rounding import added
from eqx_gpt.shapes import Hidden, PRNGKey
from eqx_gpt.tap import NO_TAP, Tap


class Block(eqx.Module):
    """Residual block; `config.residual` says which of its norms there are.

    x ──┬── norm1 ── attention ── post_norm1 ── + ──┬── norm2 ── mlp ── post_norm2 ── + ──>
        └───────────────────────────────────────┘   └─────────────────────────────────┘

    In the parallel ones both branches start from the same x.
    """

    norm1: Norm | None
    attention: Attention
    post_norm1: Norm | None
    norm2: Norm | None
    mlp: MLP
    post_norm2: Norm | None
    config: GPTConfig = eqx.field(static=True)

    @staticmethod
    def init(config: GPTConfig, *, key: PRNGKey) -> "Block":
        """Weights from N(0, 0.02²), those that write to the residual stream from
        N(0, 0.02² / (2 n_layer)), so that its variance does not grow with depth (GPT-2, §2.3).
        """
        key_attention, key_mlp = jax.random.split(key)
        std, out_std = 0.02, 0.02 / math.sqrt(2 * config.n_layer)

        def norm_if(there: bool) -> Norm | None:
            return Norm.init(config.norm, config.n_embd) if there else None

        kind = config.residual
        return Block(
            norm_if(kind != "post_norm"),
            Attention.init(config, std=std, out_std=out_std, key=key_attention),
            norm_if(kind in ("post_norm", "sandwich")),
            norm_if(kind in ("pre_norm", "sandwich", "parallel")),
            MLP.init(config, std=std, out_std=out_std, key=key_mlp),
            norm_if(kind in ("post_norm", "sandwich")),
            config,
        )

    def __call__(
        self,
        x: Hidden,
        *,
        kind: int = 0,
        cache: KVCache | None = None,
        layer: int = 0,
        key: PRNGKey | None = None,
        starts: Int[Array, "*batch seq"] | None = None,
        tap: Tap = NO_TAP,
    ) -> tuple[Hidden, KVCache | None]:
        """The stream after this block. `kind` is the layer's index in `config.layers`."""
        rate = self.config.dropout
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        x = tap("input", x)
        x, normed = _beside(self.norm1, x)
        attended, cache = self.attention(
            tap("attention.input", normed),
            kind=kind,
            cache=cache,
            layer=layer,
            key=keys[0],
            starts=starts,
            tap=tap,
        )
        attended = tap("attention.output", _normed(self.post_norm1, attended))
        fed = normed
        if self.config.residual == "parallel":
            x, fed = _beside(self.norm2, x)
        after = tap("middle", added(x, dropout(attended, rate, keys[1])))
        if self.config.residual not in ("parallel", "parallel_shared_norm"):
            after, fed = _beside(self.norm2, after)
        fed = self.mlp(tap("mlp.input", fed), tap=tap)
        fed = tap("mlp.output", _normed(self.post_norm2, fed))
        return tap("output", added(after, dropout(fed, rate, keys[2]))), cache


def _beside(norm: Norm | None, x: Hidden) -> tuple[Hidden, Hidden]:
    return (x, x) if norm is None else norm.beside(x)


def _normed(norm: Norm | None, x: Hidden) -> Hidden:
    return x if norm is None else norm(x)
