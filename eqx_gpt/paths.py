"""Path patching: what one head tells the logits, or another head, and nobody else.

Goldowsky-Dill et al. 2023 (arXiv:2304.05969), as Wang et al. 2022 (arXiv:2211.00593) used it on
indirect-object identification.
"""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from eqx_gpt import inspect
from eqx_gpt.gpt import GPT, check_tokens
from eqx_gpt.shapes import Logits, Tokens, TokensLike

_HEADS, _MLPS = "blocks.*.attention.heads", "blocks.*.mlp.output"
Receiver = Literal["q", "k", "v"]


class PathPatching(eqx.Module):
    """Two prompts and what the parts of a model say of them.

    `with_heads` runs the clean prompt, but some heads send what they say of the other one, along
    the direct paths to a receiver: every other head is held at what it says of the clean prompt
    (and every mlp, with `through="residual"`; with `"mlps"`, as in Wang et al., mlps compute anew).
    """

    tokens: Tokens
    clean: dict[str, Array]
    other: dict[str, Array]
    through: Literal["mlps", "residual"] = eqx.field(static=True)

    @staticmethod
    def init(
        model: GPT,
        tokens: TokensLike,
        other: TokensLike,
        *,
        through: Literal["mlps", "residual"] = "mlps",
    ) -> "PathPatching":
        """ValueError if the two prompts differ in shape; otherwise errors as `GPT.__call__`."""
        if np.shape(tokens) != np.shape(other):
            raise ValueError(f"the prompts have shapes {np.shape(tokens)} and {np.shape(other)}")
        if through not in ("mlps", "residual"):
            raise ValueError(f"through must be 'mlps' or 'residual', got {through!r}")
        frozen = (_HEADS,) if through == "mlps" else (_HEADS, _MLPS)
        _, of_tokens = inspect.run(model, tokens, capture=frozen)
        _, of_other = inspect.run(model, other, capture=(_HEADS,))
        return PathPatching(check_tokens(tokens, model.config), of_tokens, of_other, through)

    def to_logits(self, model: GPT, senders: Bool[Array | np.ndarray, "layer head"]) -> Logits:
        """The logits where `senders` (`inspect.head_mask`) speak of the other prompt."""
        return inspect.run(model, self.tokens, edits=self._edits(senders))[0]

    def to_heads(
        self,
        model: GPT,
        senders: Bool[Array | np.ndarray, "layer head"],
        receivers: Bool[Array | np.ndarray, "layer head"],
        read: Receiver,
    ) -> Logits:
        """The logits where `receivers` alone hear `senders` speak of the other prompt, in their
        queries, keys or values. Heads that share a key-value head hear through it together."""
        site = f"blocks.*.attention.{read}"
        _, heard = inspect.run(model, self.tokens, edits=self._edits(senders), capture=[site])
        receivers = self._checked(receivers)
        if read != "q":
            receivers = receivers.reshape(len(receivers), model.config.n_kv_head, -1).any(axis=-1)
        edit = inspect.ReplaceHeads(receivers, heard[site])
        return inspect.run(model, self.tokens, edits={site: edit})[0]

    def _edits(self, senders: Bool[Array | np.ndarray, "layer head"]) -> dict[str, inspect.Edit]:
        clean, other, mask = self.clean[_HEADS], self.other[_HEADS], self._checked(senders)
        mask = jnp.expand_dims(mask, (*range(1, clean.ndim - 2), clean.ndim - 1))
        spoken = jnp.where(jnp.broadcast_to(mask, clean.shape), other, clean)
        held = {_MLPS: self.clean[_MLPS]} if self.through == "residual" else {}
        return {_HEADS: spoken, **held}

    def _checked(self, heads: Bool[Array | np.ndarray, "layer head"]) -> Bool[Array, "layer head"]:
        expected = (len(self.clean[_HEADS]), self.clean[_HEADS].shape[-2])
        if jnp.shape(heads) != expected:
            raise ValueError(
                f"a mask of heads has shape {jnp.shape(heads)}, expected {expected} "
                "(inspect.head_mask)"
            )
        return jnp.asarray(heads)
