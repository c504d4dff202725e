"""GPT: embeddings, a stack of blocks, a norm and a head."""

import math
import operator
from collections.abc import Callable
from functools import partial

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
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.shapes import Hidden, Logits, PRNGKey, Tokens, TokensLike
from eqx_gpt.tree import named_arrays, with_arrays


class GPT(eqx.Module):
    """A decoder-only transformer; the default config is GPT-2 (Radford et al. 2019).

    A model is a PyTree of its weights and computes in their dtype, with float32 statistics,
    softmax and logits. Every leaf of `blocks` has a leading layer axis, or, laid out for decoding
    (`eqx_gpt.for_inference`), `blocks` is one block a layer. `head` None is the tied head: the
    token embedding itself, which is why it is not stored twice.
    """

    wte: Embedding
    wpe: Embedding | None
    blocks: Block | tuple[Block, ...]
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
            seq = tokens.shape[-1]
            positions = jnp.arange(seq) if cache is None else cache.positions(seq)
            positions = self.wpe(self.config.position.offset + positions)
            # Summed in float32, and so is the gradient of the positions over the batch.
            positions = jnp.broadcast_to(positions.astype(jnp.float32), x.shape)
            x = (x.astype(jnp.float32) + positions).astype(x.dtype)
        x = dropout(x, self.config.dropout, key_embed)
        if cache is None and isinstance(self.blocks, Block):
            return self.norm(self._scan_blocks(self.blocks, x, key_blocks)), None
        x, cache = self._run_blocks(x, cache, key_blocks)
        return self.norm(x), None if cache is None else cache.advance(tokens.shape[-1])

    def unembed(self, hidden: Hidden) -> Logits:
        return head_logits(hidden, self.head_weight, self.head_bias, self.config.logit_softcap)

    @property
    def head_weight(self) -> Array | Int8:
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
        """One after the other. A loop would copy each layer's part of the cache for every token."""
        n_layer, period = self.config.n_layer, len(self.config.layers)
        keys = [None] * n_layer if key is None else jax.random.split(key, n_layer)
        for layer in range(n_layer):
            if isinstance(self.blocks, Block):
                block = jax.tree.map(operator.itemgetter(layer), self.blocks)
            else:
                block = self.blocks[layer]
            x, cache = block(x, kind=layer % period, cache=cache, layer=layer, key=keys[layer])
        return x, cache

    def _scan_blocks(self, blocks: Block, x: Hidden, key: PRNGKey | None) -> Hidden:
        n_layer, period = self.config.n_layer, len(self.config.layers)
        arrays, static = eqx.partition(blocks, eqx.is_array)
        keys = None if key is None else jax.random.split(key, n_layer)

        def run_block(kind: int, x: Hidden, of_layer: tuple) -> Hidden:
            block_arrays, block_key = of_layer
            block = eqx.combine(block_arrays, static)
            return block(x, kind=kind, key=block_key)[0]

        def run_period(x: Hidden, of_layers: tuple, kinds: range) -> Hidden:
            for kind in kinds:
                run: Callable[..., Hidden] = partial(run_block, kind)
                if self.config.remat == "block":
                    run = jax.checkpoint(run, prevent_cse=False)
                x = run(x, jax.tree.map(operator.itemgetter(kind), of_layers))
            return x

        # The kinds are static within a period, so the scan runs over periods.
        n_left = n_layer % period
        n_whole = n_layer - n_left
        per_layer = (arrays, keys)
        whole = jax.tree.map(lambda x: x[:n_whole].reshape(-1, period, *x.shape[1:]), per_layer)
        left = jax.tree.map(lambda x: x[n_whole:], per_layer)
        unroll = max(1, min(self.config.unroll, n_layer) // period)
        x, _ = lax.scan(
            lambda x, of_period: (run_period(x, of_period, range(period)), None),
            x,
            whole,
            unroll=unroll,
        )
        return run_period(x, left, range(n_left))


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
    if isinstance(tokens, jax.Array):
        return tokens.astype(jnp.int32)
    return jax.device_put(np.asarray(tokens, np.int32))  # compiles nothing, as jnp.asarray would
