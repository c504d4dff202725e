"""GPT: embeddings, a stack of blocks, a norm and a head."""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.layers.block import Block
from eqx_gpt.layers.linear import Embedding, Linear
from eqx_gpt.layers.norm import Norm
from eqx_gpt.ops.cross_entropy import head_logits
from eqx_gpt.ops.dropout import dropout
from eqx_gpt.shapes import Hidden, Logits, PRNGKey, Tokens, TokensLike
from eqx_gpt.tree import named_arrays, with_arrays


class GPT(eqx.Module):
    """A decoder-only transformer; the default config is GPT-2 (Radford et al. 2019).

    A model is a PyTree of its weights and computes in their dtype, with float32 statistics,
    softmax and logits. Every leaf of `blocks` has a leading layer axis. `head` None is the tied
    head: the token embedding itself, which is why it is not stored twice.
    """

    wte: Embedding
    wpe: Embedding | None
    blocks: Block
    norm: Norm
    head: Linear | None
    config: GPTConfig = eqx.field(static=True)

    @staticmethod
    def init(config: GPTConfig, *, key: PRNGKey) -> "GPT":
        """Random weights as GPT-2's: N(0, 0.02²), residual projections scaled by depth."""
        key_wte, key_wpe, key_blocks, key_head = jax.random.split(key, 4)
        n_embd, std = config.n_embd, 0.02
        learned = config.position.kind == "learned"
        n_row = config.position.offset + config.block_size
        untied = config.head == "untied"
        block_keys = jax.random.split(key_blocks, config.n_layer)
        return GPT(
            Embedding.init(config.vocab_size, n_embd, std=std, key=key_wte),
            Embedding.init(n_row, n_embd, std=std, key=key_wpe) if learned else None,
            eqx.filter_vmap(lambda key: Block.init(config, key=key))(block_keys),
            Norm.init(config.norm, n_embd),
            Linear.init(n_embd, config.vocab_size, bias=config.head_bias, std=std, key=key_head)
            if untied
            else None,
            config,
        )

    def __call__(self, tokens: TokensLike, *, key: PRNGKey | None = None) -> Logits:
        """Logits of the next token at every position.

        **Arguments:**

        - `tokens`: integers of shape `(*batch, seq)`, any leading dimensions or none,
          `seq <= config.block_size`.
        - `key`: for dropout. None is evaluation mode.

        **Returns:** float32 of shape `(*batch, seq, vocab_size)`.

        **Raises:** TypeError if the tokens are not integers; ValueError if there is no sequence
        axis, if the sequence is empty or longer than `block_size`, or if a token lies outside
        the vocabulary (known only outside jit).
        """
        hidden, _ = self.hidden(check_tokens(tokens, self.config), key=key)
        return self.unembed(hidden)

    def extend(self, tokens: TokensLike, cache: KVCache) -> tuple[Logits, KVCache]:
        """Logits of `tokens` that continue the sequences in `cache`, and the longer cache.

        The caller keeps `cache.length + seq` within the cache's capacity: inside jit it cannot
        be checked. Errors as `__call__`.
        """
        hidden, longer = self.hidden(check_tokens(tokens, self.config), cache=cache)
        assert longer is not None
        return self.unembed(hidden), longer

    def hidden(
        self, tokens: Tokens, *, cache: KVCache | None = None, key: PRNGKey | None = None
    ) -> tuple[Hidden, KVCache | None]:
        """The residual stream after the last norm: all of the model but its head."""
        key_embed, key_blocks = (None, None) if key is None else jax.random.split(key)
        x = self.wte(tokens)
        if self.config.embedding_scale == "sqrt_n_embd":
            x = x * jnp.asarray(math.sqrt(self.config.n_embd), x.dtype)
        if self.wpe is not None:
            offset = self.config.position.offset + (0 if cache is None else cache.length)
            positions = self.wpe(offset + jnp.arange(tokens.shape[-1]))
            x = x + jnp.broadcast_to(positions, x.shape)
        x = dropout(x, self.config.dropout, key_embed)
        x, cache = self._run_blocks(x, cache, key_blocks)
        return self.norm(x), None if cache is None else cache.advance(tokens.shape[-1])

    def unembed(self, hidden: Hidden) -> Logits:
        return head_logits(hidden, self.head_weight, self.head_bias, self.config.logit_softcap)

    @property
    def head_weight(self) -> Array:
        """The weight of the head, `(vocab, d_model)`, tied or not."""
        return self.wte.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Array | None:
        return None if self.head is None else self.head.bias

    def with_config(self, config: GPTConfig) -> "GPT":
        """The same weights under a config that asks for the same arrays: another dropout,
        `unroll` or `remat`. KeyError or ValueError if it asks for others."""
        skeleton = eqx.filter_eval_shape(lambda: GPT.init(config, key=jax.random.key(0)))
        return with_arrays(skeleton, named_arrays(self))

    def _run_blocks(
        self, x: Hidden, cache: KVCache | None, key: PRNGKey | None
    ) -> tuple[Hidden, KVCache | None]:
        n_layer, period = self.config.n_layer, len(self.config.layers)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        keys = None if key is None else jax.random.split(key, n_layer)

        def run_block(kind: int, x: Hidden, cache: KVCache | None, of_layer: tuple) -> tuple:
            block_arrays, layer, block_key = of_layer
            block = eqx.combine(block_arrays, static)
            return block(x, kind=kind, cache=cache, layer=layer, key=block_key)

        def run_period(carry: tuple, of_layers: tuple, kinds: range) -> tuple:
            for kind in kinds:
                run: Callable[..., tuple] = partial(run_block, kind)
                if self.config.remat == "block":
                    run = jax.checkpoint(run, prevent_cse=False)
                x, cache = carry
                carry = run(x, cache, jax.tree.map(operator.itemgetter(kind), of_layers))
            return carry

        # The kinds are static within a period, so the scan runs over periods.
        per_layer = (arrays, jnp.arange(n_layer), keys)
        n_left = n_layer % period
        n_whole = n_layer - n_left

        # Decoding takes a period at a time out of a stack that has more layers than whole periods:
        # a slice of it would be copied for every token. (Gradients want the slice: they would add
        # to the whole stack in every period.)
        cut = n_left > 0 and cache is not None

        def step(carry: tuple, of_period: Any) -> tuple[tuple, None]:
            if cut:
                start = of_period * period
                of_period = jax.tree.map(
                    lambda x: lax.dynamic_slice_in_dim(x, start, period), per_layer
                )
            return run_period(carry, of_period, range(period)), None

        if cut:
            whole = jnp.arange(n_whole // period)
        else:
            whole = jax.tree.map(lambda x: x[:n_whole].reshape(-1, period, *x.shape[1:]), per_layer)
        unroll = max(1, min(self.config.unroll, n_layer) // period)
        carry, _ = lax.scan(step, (x, cache), whole, unroll=unroll)
        if n_left == 0:
            return carry
        left = jax.tree.map(lambda x: x[n_whole:], per_layer)
        return run_period(carry, left, range(n_left))


def check_tokens(tokens: TokensLike, config: GPTConfig, *, any_length: bool = False) -> Tokens:
    """Tokens as int32, or an error that says what is wrong with them (see `GPT.__call__`)."""
    shape = np.shape(tokens)
    if shape[-1:] == (0,):  # first, since an empty list has no integer dtype
        raise ValueError(f"tokens of shape {shape} are empty; give at least one token a sequence")
    dtype = getattr(tokens, "dtype", None) or np.asarray(tokens).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"tokens must be integers, got {dtype}; give token ids, for example from a tokenizer"
        )
    if not shape:
        raise ValueError(
            "tokens must have shape (*batch, seq), got a scalar; for one token give tokens[None]"
        )
    if shape[-1] > config.block_size and not any_length:
        raise ValueError(
            f"tokens of shape {shape} are {shape[-1]} long; this model takes at most "
            f"block_size={config.block_size}; give the last {config.block_size}, "
            f"tokens[..., -{config.block_size}:]"
        )
    if not isinstance(tokens, jax.core.Tracer) and np.size(tokens):
        low, high = np.min(tokens), np.max(tokens)
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"token {bad} lies outside the vocabulary, 0 to {config.vocab_size - 1}; "
                "was the text encoded by another model's tokenizer?"
            )
    return jnp.asarray(tokens, jnp.int32)
