"""GPT: embeddings, a stack of blocks, a norm and a head."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from functools import partial

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from eqx_gpt import lora
from eqx_gpt.cache import KVCache
from eqx_gpt.config import GPTConfig
from eqx_gpt.layers.attention import positions_in
from eqx_gpt.layers.block import Block
from eqx_gpt.layers.linear import RESULT, Embedding, Linear
from eqx_gpt.layers.norm import Norm
from eqx_gpt.ops.cross_entropy import head_logits
from eqx_gpt.ops.dropout import dropout
from eqx_gpt.ops.int8 import Int8
from eqx_gpt.ops.meshed import by_sequence, mesh_here
from eqx_gpt.shapes import Hidden, Logits, PRNGKey, Tokens, TokensLike
from eqx_gpt.sharding import at_use, regathers
from eqx_gpt.tap import NO_TAP, Taps
from eqx_gpt.tree import named_weights, with_arrays

_KEPT = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(RESULT),
}


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

    def __call__(
        self,
        tokens: TokensLike,
        *,
        key: PRNGKey | None = None,
        starts: Int[Array, "*batch seq"] | None = None,
    ) -> Logits:
        """Logits of the next token at every position.

        **Arguments:**

        - `tokens`: integers of shape `(*batch, seq)`, any leading dimensions or none,
          `seq <= config.block_size`.
        - `key`: for dropout. None is evaluation mode.
        - `starts`: of several documents in a sequence, the index at which that of each token
          begins. Each is computed as if it were alone. None is one document.

        **Returns:** float32 of shape `(*batch, seq, vocab_size)`.

        **Raises:** TypeError if the tokens are not integers; ValueError if there is no sequence
        axis, if the sequence is empty or longer than `block_size`, or if a token lies outside
        the vocabulary (known only outside jit).
        """
        hidden, _ = self.hidden(check_tokens(tokens, self.config), key=key, starts=starts)
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
        self,
        tokens: Tokens,
        *,
        cache: KVCache | None = None,
        key: PRNGKey | None = None,
        starts: Int[Array, "..."] | None = None,
        taps: Taps | None = None,
        dtype: DTypeLike | None = None,
    ) -> tuple[Hidden, KVCache | None]:
        """The residual stream after the last norm: all of the model but its head.

        It is computed in `dtype`, None for that of the weights: each is converted where it is used,
        and in bfloat16 its gradient is not rounded.
        With a cache, which knows itself where its sequences begin, there are no `starts`.
        """
        if cache is not None and starts is not None:
            raise ValueError("give a cache or starts: documents within a sequence are not cached")
        if cache is not None and taps is not None:
            raise ValueError("give a cache or taps: attention to a cache shows no pairs")
        # Said here and not by the annotation, which speaks only where shapes are checked.
        if starts is not None and starts.shape != tokens.shape:
            raise ValueError(
                f"starts of shape {starts.shape} do not fit tokens of shape {tokens.shape}; give "
                "one for each token"
            )
        tap = NO_TAP if taps is None else taps.outside
        key_embed, key_blocks = (None, None) if key is None else jax.random.split(key)
        x = by_sequence(at_use(self.wte)(tokens, dtype))
        if self.config.embedding_scale == "sqrt_n_embd":
            x = x * jnp.asarray(math.sqrt(self.config.n_embd), x.dtype)
        x = tap("embedding", x)
        if self.wpe is not None:
            seq = tokens.shape[-1]
            positions = positions_in(starts, seq) if cache is None else cache.positions(seq)
            positions = at_use(self.wpe)(self.config.position.offset + positions, dtype)
            positions = tap("positions", positions)
            # Summed in float32, and so is the gradient of the positions over the batch.
            positions = jnp.broadcast_to(positions.astype(jnp.float32), x.shape)
            x = (x.astype(jnp.float32) + positions).astype(x.dtype)
        x = dropout(x, self.config.dropout, key_embed)
        if cache is None and isinstance(self.blocks, Block):
            x, kept = self._scan_blocks(self.blocks, x, key_blocks, starts, taps)
        else:
            x, cache, kept = self._run_blocks(x, cache, key_blocks, starts, taps)
        if taps is not None:
            taps.shown.update(kept)
        x = tap("norm", self.norm(x))
        return x, None if cache is None else cache.advance(tokens.shape[-1])

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
        return self._made_of(named_weights(lora.detach(self)), config)

    def crop_block_size(self, block_size: int) -> "GPT":
        """The model for shorter sequences, as nanoGPT's `crop_block_size`: a table of learned
        positions loses its last rows. ValueError if `block_size` exceeds the model's."""
        config = self.config
        if block_size > config.block_size:
            raise ValueError(
                f"block_size={block_size} exceeds the {config.block_size} that the model was made "
                f"for; give {config.block_size} or less"
            )
        config = dataclasses.replace(config, block_size=block_size)
        arrays = named_weights(lora.detach(self))
        if self.wpe is not None:
            arrays["wpe.weight"] = arrays["wpe.weight"][: config.position.offset + block_size]
        return self._made_of(arrays, config)

    def unstacked(self) -> "GPT":
        """The same weights, with every layer as a block of its own."""
        blocks = tuple(self._block(layer) for layer in range(self.config.n_layer))
        return eqx.tree_at(lambda m: m.blocks, self, blocks)

    def stacked(self) -> "GPT":
        """What `unstacked` was made from."""
        if isinstance(self.blocks, Block):
            return self
        blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *self.blocks)
        return eqx.tree_at(lambda m: m.blocks, self, blocks)

    def _made_of(self, arrays: Mapping[str, Array | Int8], config: GPTConfig) -> "GPT":
        """A model of these arrays, adapters apart, which are this one's."""

        def new() -> GPT:
            model = GPT.init(config, key=jax.random.key(0))
            return model if isinstance(self.blocks, Block) else model.unstacked()

        skeleton = eqx.filter_eval_shape(new)
        return lora.attach(with_arrays(skeleton, arrays), lora.adapters(self))

    def _run_blocks(
        self,
        x: Hidden,
        cache: KVCache | None,
        key: PRNGKey | None,
        starts: Int[Array, "*batch seq"] | None,
        taps: Taps | None,
    ) -> tuple[Hidden, KVCache | None, dict[str, Array]]:
        """One after the other. A loop would copy each layer's part of the cache for every token."""
        n_layer, period = self.config.n_layer, len(self.config.layers)
        keys = [None] * n_layer if key is None else jax.random.split(key, n_layer)
        kept: dict[str, Array] = {}
        for layer in range(n_layer):
            block = self._block(layer)
            if taps is not None and layer == 0:
                kept = self._room(block, x, taps)
            tap = NO_TAP if taps is None else taps.at(layer)
            of_layer = {"kind": layer % period, "layer": layer, "key": keys[layer], "tap": tap}
            x, cache = block(x, cache=cache, starts=starts, **of_layer)
            if taps is not None:
                kept = taps.keep(kept, tap.seen, layer)
        return x, cache, kept

    def _scan_blocks(
        self,
        blocks: Block,
        x: Hidden,
        key: PRNGKey | None,
        starts: Int[Array, "*batch seq"] | None,
        taps: Taps | None,
    ) -> tuple[Hidden, dict[str, Array]]:
        n_layer, period = self.config.n_layer, len(self.config.layers)
        arrays, static = eqx.partition(blocks, eqx.is_array)
        keys = None if key is None else jax.random.split(key, n_layer)
        kept = {} if taps is None else self._room(self._block(0), x, taps)

        def run_block(kind: int, x: Hidden, of_layer: tuple) -> tuple[Hidden, dict[str, Array]]:
            block_arrays, block_key, layer = of_layer
            block, x = at_use(eqx.combine(block_arrays, static)), by_sequence(x)
            tap = NO_TAP if taps is None else taps.at(layer)
            return block(x, kind=kind, key=block_key, starts=starts, tap=tap)[0], tap.seen

        def run_period(carry: tuple, of_layers: tuple, kinds: range) -> tuple:
            x, kept = carry
            for kind in kinds:
                run: Callable[..., tuple[Hidden, dict]] = partial(run_block, kind)
                if self.config.remat != "none":
                    run = jax.checkpoint(run, prevent_cse=False, policy=_KEPT[self.config.remat])
                elif mesh_here() is not None:
                    run = jax.checkpoint(run, prevent_cse=False, policy=regathers)
                of_layer = jax.tree.map(operator.itemgetter(kind), of_layers)
                x, seen = run(x, of_layer)
                if taps is not None:
                    kept = taps.keep(kept, seen, of_layer[-1])
            return x, kept

        # The kinds are static within a period, so the scan runs over periods.
        n_left = n_layer % period
        n_whole = n_layer - n_left
        per_layer = (arrays, keys, None if taps is None else jnp.arange(n_layer))
        whole = jax.tree.map(lambda x: x[:n_whole].reshape(-1, period, *x.shape[1:]), per_layer)
        left = jax.tree.map(lambda x: x[n_whole:], per_layer)
        unroll = max(1, min(self.config.unroll, n_layer) // period)
        carry, _ = lax.scan(
            lambda carry, of_period: (run_period(carry, of_period, range(period)), None),
            (x, kept),
            whole,
            unroll=unroll,
        )
        return run_period(carry, left, range(n_left))

    def _block(self, layer: int) -> Block:
        if isinstance(self.blocks, Block):
            return jax.tree.map(operator.itemgetter(layer), self.blocks)
        return self.blocks[layer]

    def _room(self, block: Block, x: Hidden, taps: Taps) -> dict[str, Array]:
        """Where to keep what the blocks show."""

        def seen(x: Hidden) -> dict[str, Array]:
            tap = taps.shows()
            block(x, tap=tap)
            return tap.seen

        return taps.room(jax.eval_shape(seen, x))


def check_tokens(tokens: TokensLike, config: GPTConfig, *, any_length: bool = False) -> Tokens:
    """Tokens as int32, or an error that says what is wrong with them (see `GPT.__call__`)."""
    shape = np.shape(tokens)
    if 0 in shape:  # first, since an empty list has no integer dtype
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
