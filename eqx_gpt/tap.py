"""Taps: where a forward pass can be shown and changed. `inspect.py` is the user's side.

The layers call `tap(site, value)` and go on with what comes back. Without a tap that is `value`
itself and leaves nothing in the compiled program.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from eqx_gpt.config import did_you_mean

MODEL_SITES = {
    "embedding": "*batch seq d_model: the tokens' embeddings, scaled if the model scales them",
    "positions": "seq d_model: what a learned table of positions adds to them "
    "(*batch seq d_model with starts)",
    "norm": "*batch seq d_model: the residual stream after the last norm, which the head reads",
    "logits": "*batch seq vocab",
}
BLOCK_SITES = {
    "input": "*batch seq d_model: the residual stream before the block",
    "attention.input": "*batch seq d_model: what attention reads",
    "attention.q": "*batch seq head head_dim: queries as they meet keys, normalised and rotated",
    "attention.k": "*batch seq kv_head head_dim: keys, likewise",
    "attention.v": "*batch seq kv_head head_dim",
    "attention.scores": "*batch head seq seq: query by key, scaled, capped; -inf where "
    "hidden, so that 0 * scores is no number",
    "attention.weights": "*batch head seq seq: their softmax",
    "attention.heads": "*batch seq head head_dim: each head's mean of values",
    "attention.output": "*batch seq d_model: what attention adds to the stream",
    "middle": "*batch seq d_model: the stream with it",
    "mlp.input": "*batch seq d_model: what the mlp reads",
    "mlp.inner": "*batch seq d_ff: its hidden units, after activation and gate",
    "mlp.output": "*batch seq d_model: what the mlp adds to the stream",
    "output": "*batch seq d_model: the residual stream after the block",
}
_PAIRS = ("attention.scores", "attention.weights")

# What TransformerLens calls them, for suggestions.
_LENS_NAMES = {
    "pattern": "attention.weights",
    "hook_pattern": "attention.weights",
    "hook_attn_scores": "attention.scores",
    "z": "attention.heads",
    "hook_z": "attention.heads",
    "hook_attn_out": "attention.output",
    "hook_mlp_out": "mlp.output",
    "hook_resid_pre": "input",
    "hook_resid_mid": "middle",
    "hook_resid_post": "output",
}

Edit = Array | np.ndarray | Callable[[Array, Int[Array, ""] | None], Array]


@dataclass(frozen=True)
class Request:
    """What is asked of one site: in `layers`, an edit or, if None, to show it."""

    name: str
    site: str
    layers: tuple[int | None, ...]
    edit: Edit | None = None


@dataclass(frozen=True)
class Tap:
    """What is asked of one layer, or of the model outside its layers (`layer` None).

    `layer` may be traced: then a program holds what is asked of any layer, and what is not asked
    of all of them lies behind a condition.
    """

    requests: tuple[Request, ...] = ()
    layer: Int[Array, ""] | int | None = None
    n_layer: int = 0
    seen: dict[str, Array] = field(default_factory=dict)

    def __call__(self, site: str, value: Array) -> Array:
        """The value, edited as asked; kept in `seen` if asked for."""
        for request in self.requests:
            if request.site == site and request.edit is not None:
                edit = partial(_edited, request.name, request.edit, layer=self.layer)
                value = self.where_asked([request], edit, lambda value: value, value)
        if any(request.site == site and request.edit is None for request in self.requests):
            self.seen[site] = value
        return value

    def where_asked(
        self,
        requests: Sequence[Request],
        then: Callable[..., Any],
        otherwise: Callable[..., Any],
        *operands: Any,
    ) -> Any:
        """`then(*operands)` in the layers that some of the requests name."""
        layers = sorted({i for request in requests for i in request.layers if i is not None})
        # Of a layer whose number is known, `Taps.at` leaves nothing that is not asked of it.
        if self.layer is None or isinstance(self.layer, int) or len(layers) == self.n_layer:
            return then(*operands)
        return lax.cond(_is_in(self.layer, layers), then, otherwise, *operands)

    @property
    def of_pairs(self) -> tuple[Request, ...]:
        """What is asked of all pairs of positions, which attention never holds by itself."""
        return tuple(request for request in self.requests if request.site in _PAIRS)


NO_TAP = Tap()


@dataclass(frozen=True)
class Taps:
    """What is asked of a whole forward pass, by names such as `logits`, `blocks.3.output` and
    `blocks.*.attention.heads`."""

    requests: tuple[Request, ...]
    n_layer: int
    outside: Tap
    shown: dict[str, Array] = field(default_factory=dict)  # by site, with a leading axis of layers

    @staticmethod
    def init(captures: Sequence[str], edits: Mapping[str, Edit], n_layer: int) -> "Taps":
        """ValueError, with the near names, for a name that is not there."""
        for name, edit in edits.items():
            if edit is None:
                raise ValueError(f"the edit of {name!r} is None; give an array or a function")
        # By name, for a dict that has passed through jit is in another order.
        ordered = sorted(edits.items(), key=lambda item: not item[0].startswith("blocks.*"))
        requests = [*((name, None) for name in captures), *ordered]
        parsed = [Request(name, *_parse(name, n_layer), edit) for name, edit in requests]
        outside = tuple(request for request in parsed if request.layers == (None,))
        inside = tuple(request for request in parsed if request.layers != (None,))
        return Taps(inside, n_layer, Tap(outside))

    def at(self, layer: Int[Array, ""] | int) -> Tap:
        """The tap of a layer. Of one whose number is known, with what is asked of it alone."""
        known = isinstance(layer, int)
        requests = [r for r in self.requests if not known or layer in r.layers]
        return Tap(tuple(requests), layer, self.n_layer)

    def shows(self) -> Tap:
        """Of a layer that is asked for all that any is, but edited nowhere."""
        requests = [Request(r.name, r.site, (0,)) for r in self.requests if r.edit is None]
        return Tap(tuple(requests), 0, self.n_layer)

    def room(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
        """For what a block shows, as many as the layers that are asked to, and one for the others:
        a condition on so large a thing would copy all of it."""
        return {
            site: jnp.zeros((len(self._layers(site)) + 1, *x.shape), x.dtype)
            for site, x in shapes.items()
        }

    def keep(
        self, kept: dict[str, Array], seen: dict[str, Array], layer: Int[Array, ""] | int
    ) -> dict[str, Array]:
        """`kept`, with what was seen in this layer."""
        return {site: self._kept(site, kept[site], seen.get(site), layer) for site in kept}

    def _kept(self, site: str, kept: Array, seen: Array | None, layer: Any) -> Array:
        if seen is None:
            return kept
        layers = self._layers(site)
        slots = [layers.index(i) if i in layers else len(layers) for i in range(self.n_layer)]
        slot = jnp.asarray(slots)[layer]
        return lax.dynamic_update_index_in_dim(kept, seen, slot, axis=0)

    def _layers(self, site: str) -> list[int]:
        asked = [r.layers for r in self.requests if r.site == site and r.edit is None]
        return sorted({i for layers in asked for i in layers if i is not None})

    def seen(self, captures: Sequence[str]) -> dict[str, Array]:
        """What was asked for, by name; a `*` has a leading layer axis."""
        found = dict(self.outside.seen)
        for request in self.requests:
            if request.edit is None:
                all_of_site = self.shown[request.site][:-1]
                every = request.name.startswith("blocks.*")
                slot = self._layers(request.site).index(request.layers[0] or 0)
                found[request.name] = all_of_site if every else all_of_site[slot]
        return {name: found[name] for name in captures}


def _is_in(layer: Array, layers: Sequence[int]) -> Array:
    return jnp.any(layer == jnp.asarray(layers, jnp.int32))


def _parse(name: str, n_layer: int) -> tuple[str, tuple[int | None, ...]]:
    """The site of a name, and its layers (None: outside them all)."""
    if name in MODEL_SITES:
        return name, (None,)
    match = re.fullmatch(r"blocks\.(\*|-?\d+)\.(.+)", name)
    if not match or match[2] not in BLOCK_SITES:
        known = [*MODEL_SITES, *(f"blocks.*.{site}" for site in BLOCK_SITES)]
        *_, last = name.split(".")
        like = re.sub(r"^blocks\.[^.]*\.", "blocks.*.", name)
        like = f"blocks.*.{_LENS_NAMES[last]}" if last in _LENS_NAMES else like
        raise ValueError(
            f"no activation {name!r}; {did_you_mean(like, known)} (eqx_gpt.inspect.names lists all)"
        )
    if match[1] == "*":
        return match[2], tuple(range(n_layer))
    if not 0 <= int(match[1]) < n_layer:
        raise ValueError(f"{name!r}: the model has blocks 0 to {n_layer - 1}, or * for all")
    return match[2], (int(match[1]),)


def _edited(name: str, edit: Edit, value: Array, *, layer: Int[Array, ""] | int | None) -> Array:
    layer = None if layer is None else jnp.asarray(layer, jnp.int32)
    if callable(edit):
        try:
            new = edit(value, layer)
        except TypeError as error:
            raise TypeError(f"the edit of {name!r}, called with (value, layer): {error}") from error
        if jnp.shape(new) != value.shape:
            raise ValueError(
                f"the edit of {name!r} returned shape {jnp.shape(new)}, expected {value.shape}"
            )
    else:
        every = name.startswith("blocks.*")
        expected = (jnp.shape(edit)[:1] if every else ()) + value.shape
        if jnp.shape(edit) != expected:
            asked = f"(n_layer, {', '.join(map(str, value.shape))})" if every else value.shape
            raise ValueError(f"the patch of {name!r} has shape {jnp.shape(edit)}, expected {asked}")
        new = edit
        if every:
            assert layer is not None
            new = lax.dynamic_index_in_dim(jnp.asarray(edit), layer, keepdims=False)
    return jnp.asarray(new).astype(value.dtype)
