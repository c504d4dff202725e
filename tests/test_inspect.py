"""Activations captured, patched and ablated: against float64, and bit for bit where nothing is."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, lively, random_tokens

import eqx_gpt
from eqx_gpt import GPT, LoRAConfig, inspect, lora
from eqx_gpt.attribution import attribute
from eqx_gpt.paths import PathPatching
from eqx_gpt.pictures import attention_picture, heads_picture, lens_picture
from eqx_gpt.tap import BLOCK_SITES
from eqx_gpt.tree import named_arrays

SEQ = 7

run = eqx.filter_jit(inspect.run)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> GPT:
    return lively(ARCHITECTURES[request.param])


@pytest.fixture(scope="module")
def llama() -> GPT:
    return lively(ARCHITECTURES["llama"])


@contextmanager
def all_optimizations() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def error(found: object, expected: object) -> float:
    """The norm of the difference, relative to that of `expected`; hidden scores are left out."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.array_equal(np.isneginf(found), np.isneginf(expected))
    there = ~np.isneginf(expected)
    found, expected = found[there], expected[there]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def reference_run(
    model: GPT, tokens: np.ndarray, edits: Mapping[str, reference.Tap] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and all activations of one sequence, in float64, some changed on the way."""
    seen = {}

    def tap(name: str, value: np.ndarray) -> np.ndarray:
        seen[name] = (edits or {}).get(name, reference.no_tap)(name, value)
        return seen[name]

    logits = reference.gpt(model.config, named_arrays(model), tokens, tap)
    return logits, seen


# Every architecture


@pytest.mark.usefixtures("quick_compilation")
def test_captured_equal_float64(model: GPT) -> None:
    tokens = random_tokens(model.config, SEQ)
    _, expected = reference_run(model, tokens)
    _, seen = run(model, tokens, capture=tuple(inspect.names(model)))
    assert {name.replace("*", "0") for name in seen} <= expected.keys()
    for name, value in expected.items():
        _, _, site = name.split(".", 2) if name.startswith("blocks") else ("", "", name)
        found = seen.get(name)
        if found is None:
            layer = int(name.split(".")[1])
            found = seen[f"blocks.*.{site}"][layer]
        assert error(found, value) < 5e-6, name


@pytest.mark.usefixtures("quick_compilation")
def test_edits_equal_float64(model: GPT) -> None:
    """Of every site of one layer; what is captured behind them is that of the edited run."""
    tokens = random_tokens(model.config, SEQ)
    names, later = [f"blocks.1.{site}" for site in BLOCK_SITES], "blocks.1.output"
    expected, seen = reference_run(model, tokens, dict.fromkeys(names, lambda _, x: 0.75 * x))
    edits = dict.fromkeys(names, _three_quarters)
    found, captured = run(model, tokens, edits=edits, capture=(later,))
    assert error(found, expected) < 5e-6
    assert error(captured[later], seen[later]) < 5e-6


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("site", BLOCK_SITES)
def test_every_edit_matters(llama: GPT, site: str) -> None:
    tokens = random_tokens(llama.config, SEQ)
    name = f"blocks.0.{site}"
    expected, _ = reference_run(llama, tokens, {name: lambda _, x: 0.75 * x})
    plain, _ = reference_run(llama, tokens)
    found, _ = run(llama, tokens, edits={name: _three_quarters})
    assert error(found, expected) < 5e-6
    assert error(plain, expected) > 1e-4


def _three_quarters(value: jax.Array, layer: jax.Array | None) -> jax.Array:
    return 0.75 * value


def test_plain_pass_is_the_same_program(model: GPT) -> None:
    tokens = random_tokens(model.config, 2, SEQ)

    def lowered(run: Callable[[GPT, jax.Array], jax.Array]) -> str:
        def logits(model: GPT, tokens: jax.Array) -> jax.Array:
            return run(model, tokens)

        return jax.jit(logits).lower(model, tokens).as_text()

    plain = lowered(lambda model, tokens: model(tokens))
    assert lowered(lambda model, tokens: inspect.run(model, tokens)[0]) == plain


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_patching_nothing_changes_no_bit(name: str) -> None:
    """Captured, edited by nothing, or patched with what was there anyway: the same bits."""
    model = lively(ARCHITECTURES[name])
    tokens = random_tokens(model.config, 2, SEQ)
    names = tuple(inspect.names(model))
    with all_optimizations():
        plain = eqx.filter_jit(lambda model, tokens: model(tokens))(model, tokens)
        captured, seen = run(model, tokens, capture=names)
        assert np.array_equal(captured, plain)
        assert np.array_equal(run(model, tokens, edits=seen)[0], plain)
        nothing = dict.fromkeys(names, _same)
        assert np.array_equal(run(model, tokens, edits=nothing)[0], plain)
        one = ("blocks.1.attention.weights", "blocks.0.mlp.inner")
        assert np.array_equal(run(model, tokens, capture=one)[0], plain)


def _same(value: jax.Array, layer: jax.Array | None) -> jax.Array:
    return value


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "olmo", "gemma2", "olmo2"])
def test_shares_sum_to_the_logit_and_equal_float64(name: str) -> None:
    model = lively(ARCHITECTURES[name])
    config = model.config
    tokens = random_tokens(config, 2, SEQ)
    target, minus, position = np.array([3, 5]), np.array([7, 2]), SEQ - 2
    found = eqx.filter_jit(attribute)(model, tokens, target, minus=minus, position=position)
    for row in range(2):
        logits, seen = reference_run(model, tokens[row])
        expected = _shares(model, seen, target[row], minus[row], position)
        scale = np.abs(expected["heads"]).max()
        for part, value in expected.items():
            share = getattr(found, part)[..., row]
            assert share.shape == value.shape
            assert np.abs(share - value).max() < 2e-5 * scale, part
        cap = config.logit_softcap
        uncapped = logits if cap is None else cap * np.arctanh(logits / cap)
        difference = uncapped[position, target[row]] - uncapped[position, minus[row]]
        # Beside the heads' shares it is a sum of larger ones.
        largest = max(np.abs(value).max() for value in expected.values())
        assert abs(found.total[row] - difference) < 2e-5 * largest


def _shares(
    model: GPT, seen: dict[str, np.ndarray], target: int, minus: int, position: int
) -> dict[str, np.ndarray]:
    """Every part as a vector of its own, through norms whose statistics are those of the whole."""
    config = model.config
    arrays = {name: np.asarray(x, np.float64) for name, x in named_arrays(model).items()}
    head = arrays["wte.weight" if config.head == "tied" else "head.weight"]
    head_bias = arrays.get("head.bias", np.zeros(len(head)))

    def frozen(prefix: str, x: np.ndarray, part: np.ndarray, layer: int | None) -> np.ndarray:
        """A part of x through the norm, without its bias."""
        weight = arrays.get(f"{prefix}.weight", np.ones(()))
        weight = weight if layer is None or not weight.shape else weight[layer]
        weight = 1 + weight if config.norm.scale == "one_plus_weight" else weight
        if config.norm.kind == "layernorm":
            return (part - part.mean()) / np.sqrt(x.var() + config.norm.eps) * weight
        return part / np.sqrt((x**2).mean() + config.norm.eps) * weight

    last = seen[f"blocks.{config.n_layer - 1}.output"][position]

    def share(part: np.ndarray) -> float:
        return float(frozen("norm", last, part, None) @ (head[target] - head[minus]))

    bias = arrays.get("norm.bias", np.zeros(config.n_embd)) @ (head[target] - head[minus])
    bias += head_bias[target] - head_bias[minus]
    of_heads, of_bias, of_mlp = [], [], []
    for layer in range(config.n_layer):
        z = seen[f"blocks.{layer}.attention.heads"][position]
        weight = arrays["blocks.attention.out.weight"][layer]
        out_bias = arrays.get("blocks.attention.out.bias")
        out_bias = np.zeros(config.n_embd) if out_bias is None else out_bias[layer]
        parts = [z[h] @ weight[:, h * len(z[h]) : (h + 1) * len(z[h])].T for h in range(len(z))]
        if config.residual in ("post_norm", "sandwich"):
            whole = np.sum(parts, axis=0) + out_bias
            prefix = "blocks.post_norm1"
            after = [frozen(prefix, whole, part, layer) for part in [*parts, out_bias]]
            *parts, out_bias = after
            norm_bias = arrays.get(f"{prefix}.bias")
            out_bias = out_bias + (0 if norm_bias is None else norm_bias[layer])
        of_heads.append([share(part) for part in parts])
        of_bias.append(share(out_bias))
        of_mlp.append(share(seen[f"blocks.{layer}.mlp.output"][position]))
    there = "positions" in seen
    return {
        "embedding": np.array(share(seen["embedding"][position])),
        "position": np.array(share(seen["positions"][position]) if there else 0.0),
        "heads": np.array(of_heads),
        "attention_bias": np.array(of_bias),
        "mlp": np.array(of_mlp),
        "bias": np.array(bias),
    }


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("through", "read"), [("mlps", "logits"), ("residual", "q"), ("mlps", "v")]
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_path_patching_equals_float64(name: str, through: str, read: str) -> None:
    model = lively(ARCHITECTURES[name])
    config = model.config
    tokens, other = random_tokens(config, SEQ), random_tokens(config, SEQ, seed=1)
    sender, receiver = (0, 1), (1, 0)
    senders = inspect.head_mask(config, [sender])
    receivers = inspect.head_mask(config, [receiver])

    @eqx.filter_jit
    def patched(model: GPT) -> jax.Array:
        patching = PathPatching.init(model, tokens, other, through=through)  # pyright: ignore[reportArgumentType]
        if read == "logits":
            return patching.to_logits(model, senders)
        return patching.to_heads(model, senders, receivers, read)  # pyright: ignore[reportArgumentType]

    _, clean = reference_run(model, tokens)
    _, theirs = reference_run(model, other)
    held = {}
    for layer in range(config.n_layer):
        name = f"blocks.{layer}.attention.heads"
        value = clean[name].copy()
        if layer == sender[0]:
            value[:, sender[1]] = theirs[name][:, sender[1]]
        held[name] = lambda _, __, value=value: value
        if through == "residual":
            name = f"blocks.{layer}.mlp.output"
            held[name] = lambda _, __, value=clean[name]: value
    expected, heard = reference_run(model, tokens, held)
    if read != "logits":
        name = f"blocks.{receiver[0]}.attention.{read}"
        group = 1 if read == "q" else config.n_head // config.n_kv_head

        def hear(_: str, value: np.ndarray) -> np.ndarray:
            value = value.copy()
            value[:, receiver[1] // group] = heard[name][:, receiver[1] // group]
            return value

        expected, _ = reference_run(model, tokens, {name: hear})
    assert error(patched(model), expected) < 5e-6
    clean_logits = eqx.filter_jit(lambda model: model(tokens))(model)
    assert error(clean_logits, expected) > 1e-4  # or the patch would prove nothing


# What does not depend on the architecture


def test_gradients_pass_through_edits(llama: GPT) -> None:
    """Of each head's gate, against differences of the float64 reference."""
    tokens = random_tokens(llama.config, SEQ)
    weights = np.random.default_rng(1).standard_normal((SEQ, llama.config.vocab_size))
    shape = (llama.config.n_layer, llama.config.n_head)

    @eqx.filter_jit
    @jax.grad
    def gradient(gates: jax.Array) -> jax.Array:
        def gate(z: jax.Array, layer: jax.Array | None) -> jax.Array:
            return z * jnp.broadcast_to(gates[layer][:, None], z.shape)

        logits, _ = inspect.run(llama, tokens, edits={"blocks.*.attention.heads": gate})
        return jnp.sum(logits * jnp.asarray(weights, jnp.float32))

    def total(gates: np.ndarray) -> float:
        edits = {
            f"blocks.{i}.attention.heads": lambda _, z, i=i: z * gates[i][:, None]
            for i in range(shape[0])
        }
        return float(np.sum(reference_run(llama, tokens, edits)[0] * weights))

    found = gradient(jnp.ones(shape, jnp.float32))
    expected = np.zeros(shape)
    for index in np.ndindex(shape):
        step = np.zeros(shape)
        step[index] = 1e-5
        expected[index] = (total(1 + step) - total(1 - step)) / 2e-5
    assert error(found, expected) < 2e-5


@pytest.mark.parametrize("site", ["attention.scores", "attention.weights"])
def test_gradients_pass_through_edits_that_change_nothing(llama: GPT, site: str) -> None:
    tokens = random_tokens(llama.config, SEQ)
    name = f"blocks.1.{site}"

    def edited(x: Any, gate: Any) -> Any:
        if site == "attention.weights":
            return x * gate
        return x + (gate - 1) * np.arange(SEQ, dtype=np.float32)  # finite, where x is hidden

    @jax.grad
    def gradient(gate: jax.Array) -> jax.Array:
        def edit(x: jax.Array, layer: jax.Array | None) -> jax.Array:
            if site == "attention.weights":
                return x * gate
            return x + jnp.broadcast_to((gate - 1) * jnp.arange(SEQ, dtype=jnp.float32), x.shape)

        return inspect.run(llama, tokens, edits={name: edit})[0][-1, 3]

    def logit(gate: float) -> float:
        return reference_run(llama, tokens, {name: lambda _, x: edited(x, gate)})[0][-1, 3]

    expected = (logit(1 + 1e-5) - logit(1 - 1e-5)) / 2e-5
    assert abs(gradient(jnp.ones(())) - expected) < 1e-4 * abs(expected)


def test_edits_of_all_layers_come_before_those_of_one(llama: GPT) -> None:
    tokens = random_tokens(llama.config, SEQ)
    edits = {
        "blocks.1.output": lambda x, layer: x + jnp.ones_like(x),
        "blocks.*.output": lambda x, layer: 2 * x,
    }
    eager, _ = inspect.run(llama, tokens, edits=edits)
    assert error(run(llama, tokens, edits=edits)[0], eager) < 2e-6
    one = {
        "blocks.1.output": lambda x, layer: 2 * x + jnp.ones_like(x),
        "blocks.0.output": lambda x, layer: 2 * x,
    }
    assert error(run(llama, tokens, edits=one)[0], eager) < 2e-6


def test_head_outputs_sum_to_what_attention_adds(llama: GPT) -> None:
    names = ("blocks.*.attention.heads", "blocks.*.attention.output")
    _, seen = run(llama, random_tokens(llama.config, 2, SEQ), capture=names)
    each = inspect.head_outputs(llama, seen[names[0]])
    assert each.shape == (2, 2, SEQ, llama.config.n_head, llama.config.n_embd)
    assert error(each.sum(axis=-2), seen[names[1]]) < 2e-6


def test_gradient_reaches_a_patched_activation(llama: GPT) -> None:
    """Patched in the last layer, only what comes behind it stands between it and the logits."""
    tokens = random_tokens(llama.config, SEQ)
    _, seen = run(llama, tokens, capture=["blocks.1.output", "blocks.*.output"])
    assert np.array_equal(seen["blocks.1.output"], seen["blocks.*.output"][1])

    def first_logit(stream: jax.Array) -> jax.Array:
        return inspect.run(llama, tokens, edits={"blocks.1.output": stream})[0][2, 3]

    found = eqx.filter_jit(jax.grad(first_logit))(seen["blocks.1.output"])
    expected = jax.grad(lambda x: llama.unembed(llama.norm(x))[2, 3])(seen["blocks.1.output"])
    assert error(found, expected) < 2e-6


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("change", [{"remat": "block"}, {"unroll": 3}])
def test_remat_and_unroll_show_the_same(change: dict) -> None:
    model = lively(ARCHITECTURES["no_bias"])
    other = model.with_config(dataclasses.replace(model.config, **change))
    tokens = random_tokens(model.config, 2, SEQ)
    names = ("blocks.*.middle", "blocks.2.attention.weights")

    def loss(model: GPT) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, seen = inspect.run(model, tokens, capture=names)
        return jnp.sum(jnp.sin(logits)), seen

    both = [eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(m) for m in (model, other)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        assert error(a, b) < 2e-5


def test_batch_vmap_and_one_sequence_show_the_same(llama: GPT) -> None:
    tokens = random_tokens(llama.config, 3, SEQ)
    ask: dict[str, Any] = {
        "capture": ["blocks.*.attention.weights", "blocks.1.mlp.inner", "norm"],
        "edits": {"blocks.0.attention.heads": _three_quarters},
    }
    logits, seen = run(llama, tokens, **ask)
    alone = [run(llama, row, **ask) for row in tokens]
    assert error(jnp.stack([a for a, _ in alone]), logits) < 2e-6
    mapped = eqx.filter_jit(lambda m, t: jax.vmap(lambda row: inspect.run(m, row, **ask))(t))
    logits_mapped, seen_mapped = mapped(llama, tokens)
    assert error(logits_mapped, logits) < 2e-6
    for name in ask["capture"]:
        axis = int("*" in name)
        assert error(jnp.stack([s[name] for _, s in alone], axis=axis), seen[name]) < 2e-6
        assert error(jnp.moveaxis(seen_mapped[name], 0, axis), seen[name]) < 2e-6


def test_packed_documents_show_what_each_shows_alone(llama: GPT) -> None:
    documents = [random_tokens(llama.config, n, seed=n) for n in (3, 5)]
    starts = jnp.asarray([0] * 3 + [3] * 5)
    names = ("blocks.*.attention.heads", "blocks.1.attention.weights", "norm")
    _, packed = run(llama, np.concatenate(documents), capture=names, starts=starts)
    for tokens, part in zip(documents, (slice(0, 3), slice(3, 8)), strict=True):
        _, alone = run(llama, tokens, capture=names)
        assert error(packed[names[0]][:, part], alone[names[0]]) < 2e-6
        assert error(packed[names[1]][:, part, part], alone[names[1]]) < 2e-6
        assert error(packed[names[2]][part], alone[names[2]]) < 2e-6
    assert not np.any(packed[names[1]][:, 3:, :3])


def test_adapters_have_their_share(llama: GPT) -> None:
    tokens, target = random_tokens(llama.config, SEQ), np.array(3)
    adapted = lora.init(llama, LoRAConfig(rank=2), key=jax.random.key(0))
    adapted = jax.tree.map(lambda x: x + 0.1, adapted)  # or else they would add nothing yet
    logits, _ = run(adapted, tokens)
    assert abs(attribute(adapted, tokens, target).total - logits[-1, 3]) < 1e-4


def test_models_laid_out_for_inference(llama: GPT) -> None:
    fast = eqx_gpt.for_inference(llama)
    tokens = random_tokens(llama.config, 2, SEQ)
    names = ["blocks.*.output", "blocks.1.attention.weights", "blocks.0.attention.v"]
    logits, seen = run(fast, tokens, capture=names)
    assert np.array_equal(logits, eqx.filter_jit(lambda m, t: m(t))(fast, tokens))
    _, expected = run(llama, tokens, capture=names)
    for name in names:
        assert error(seen[name], expected[name]) < 0.05
    one = run(fast, tokens, edits={"blocks.1.mlp.output": _three_quarters})[0]
    assert error(one, run(llama, tokens, edits={"blocks.1.mlp.output": _three_quarters})[0]) < 0.05
    with pytest.raises(ValueError, match="laid out for inference"):
        attribute(fast, tokens, np.array([1, 2]))


def test_heads_are_replaced(llama: GPT) -> None:
    config, tokens = llama.config, random_tokens(llama.config, 2, SEQ)
    mask = inspect.head_mask(config, [(0, 3), (1, 5)])
    assert np.array_equal(np.argwhere(mask), [[0, 3], [1, 5]])
    name = "blocks.*.attention.heads"
    _, seen = run(llama, tokens, capture=[name])
    mean = seen[name].mean(axis=(1, 2))
    for by in (None, mean, seen[name] * 2):
        edit = {name: inspect.ReplaceHeads(mask, by)}
        _, replaced = run(llama, tokens, edits=edit, capture=[name])
        for layer, head in np.argwhere(mask):
            found = replaced[name][layer, ..., head, :]
            if by is None:
                assert not found.any()
            elif by.ndim == 3:
                assert np.array_equal(found, jnp.broadcast_to(by[layer, head], found.shape))
            elif layer == 0:
                assert np.array_equal(found, by[layer, ..., head, :])
        kept = np.setdiff1d(np.arange(config.n_head), [3])
        assert np.array_equal(replaced[name][0][..., kept, :], seen[name][0][..., kept, :])
    with pytest.raises(IndexError, match="no head 6 in layer 0"):
        inspect.head_mask(config, [(0, 6)])


def test_logit_lens_ends_at_the_logits(llama: GPT) -> None:
    tokens = random_tokens(llama.config, 2, SEQ)
    logits, seen = run(llama, tokens, capture=["blocks.*.output"])
    lens = inspect.logit_lens(llama, seen["blocks.*.output"])
    assert lens.shape == (2, *logits.shape)
    assert error(lens[-1], logits) < 2e-6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"capture": ["blocks.0.attention.head"]}, r"did you mean 'blocks\.\*\.attention\.head"),
        ({"capture": "logit"}, "did you mean 'logits'"),
        ({"capture": ["blocks.2.output"]}, "has blocks 0 to 1, or"),
        ({"capture": ["blocks.-1.output"]}, "has blocks 0 to 1, or"),
        ({"capture": ["positions"]}, "no table of positions"),
        ({"edits": {"blocks.x.output": _same}}, "no activation 'blocks.x.output'"),
        ({"edits": {"norm": np.zeros((1, 2), np.float32)}}, r"shape \(1, 2\), expected \(7, 23\)"),
        (
            {"edits": {"blocks.*.output": np.zeros((7, 23), np.float32)}},
            r"expected \(n_layer, 7, 23\)",
        ),
        (
            {"edits": {"blocks.1.output": lambda x, layer: x[:1]}},
            r"returned shape \(1, 23\), expected \(7, 23\)",
        ),
    ],
)
def test_mistakes(llama: GPT, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect.run(llama, random_tokens(llama.config, SEQ), **kwargs)


def test_mistakes_of_attribution_and_paths(llama: GPT) -> None:
    tokens = random_tokens(llama.config, 2, SEQ)
    with pytest.raises(ValueError, match=r"shape \(3,\), expected one a sequence: \(2,\)"):
        attribute(llama, tokens, np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="position 7 lies outside a sequence of 7 tokens"):
        attribute(llama, tokens, np.array([1, 2]), position=7)
    with pytest.raises(ValueError, match="token 41 lies outside the vocabulary"):
        attribute(llama, tokens, np.array([1, 41]))
    with pytest.raises(ValueError, match=r"mask of heads has shape \(1, 6\), expected \(2, 6\)"):
        PathPatching.init(llama, tokens, tokens).to_logits(llama, np.ones((1, 6), bool))
    few = {"blocks.*.attention.heads": inspect.ReplaceHeads(np.ones((1, 6), bool))}
    with pytest.raises(ValueError, match=r"mask has shape \(1, 6\), expected \(2, ...\)"):
        inspect.run(llama, tokens, edits=few)
    narrow = {"blocks.*.attention.k": inspect.ReplaceHeads(np.ones((2, 6), bool))}
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6\) for 2 heads"):
        inspect.run(llama, tokens, edits=narrow)
    with pytest.raises(ValueError, match=r"shapes \(2, 7\) and \(7,\)"):
        PathPatching.init(llama, tokens, tokens[0])


# Pictures and the worked example


def test_pictures(llama: GPT, tmp_path: Path) -> None:
    tokens = random_tokens(llama.config, SEQ)
    weights = "blocks.*.attention.weights"
    _, seen = run(llama, tokens, capture=[weights, "blocks.*.output"])
    labels = [f"$${token}\\foo$" for token in tokens]
    squares = {f"head {head}": np.asarray(seen[weights][1, head]) for head in (0, 5)}
    lens = jax.nn.softmax(inspect.logit_lens(llama, seen["blocks.*.output"]))
    best = np.asarray(lens.max(axis=-1))
    texts = [[str(token) for token in row] for row in lens.argmax(axis=-1)]
    figures = [
        attention_picture(squares, labels),
        heads_picture({"before": np.ones((2, 6)), "after": np.zeros((2, 6))}, "nats"),
        lens_picture(best, texts, labels),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")


def test_example_runs_from_anywhere(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "scripts/examples/induction.py"
    command = [sys.executable, str(script), "--max_iters", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("looks") == 2
    assert (tmp_path / "induction.png").exists()
