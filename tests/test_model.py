"""What every architecture must do, against float64 and against itself."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, lively, random_tokens
from jaxtyping import PyTree

import eqx_gpt
from eqx_gpt import GPT, GPTConfig, KVCache, LayerConfig, cast
from eqx_gpt.gpt import check_tokens
from eqx_gpt.layers.attention import Attention
from eqx_gpt.layers.block import Block
from eqx_gpt.layers.linear import Linear
from eqx_gpt.layers.norm import Norm
from eqx_gpt.tree import named_arrays

SEQ = 7

logits = eqx.filter_jit(lambda model, tokens, key=None: model(tokens, key=key))
extend = eqx.filter_jit(lambda model, tokens, cache: model.extend(tokens, cache))


@eqx.filter_jit
@eqx.filter_value_and_grad(has_aux=True)
def value_and_grad(
    model: GPT, tokens: jax.Array, weights: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Of a weighted sum of the logits; with it, the logits."""
    out = model(tokens, key=key)
    return jnp.sum(out * weights), out


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> GPT:
    return lively(ARCHITECTURES[request.param])


def changed(model: GPT, **fields: object) -> GPT:
    return model.with_config(dataclasses.replace(model.config, **fields))


def random_weights(config: GPTConfig) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((2, SEQ, config.vocab_size)), jnp.float32)


def norm_of_difference(a: object, b: object) -> float:
    """Relative to the norm of `b`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# Every architecture


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_logits_are_float32_with_any_leading_dimensions(model: GPT, batch: tuple[int, ...]) -> None:
    tokens = random_tokens(model.config, *batch, SEQ)
    out = eqx.filter_eval_shape(cast(model, jnp.bfloat16), tokens)
    assert out.shape == (*batch, SEQ, model.config.vocab_size)
    assert out.dtype == jnp.float32


def test_logits_equal_float64_reference(model: GPT) -> None:
    """The reference loops over unstacked blocks: the scan over the stack is tested as well."""
    tokens = random_tokens(model.config, 2, SEQ)
    expected = [reference.gpt(model.config, named_arrays(model), row) for row in tokens]
    assert norm_of_difference(logits(model, tokens), expected) < 2e-6


def test_gradients_equal_float64_differences(model: GPT) -> None:
    """Along a random direction in each array by itself; no dropout."""
    config, arrays = model.config, named_arrays(model)
    tokens, weights = random_tokens(config, 2, SEQ), random_weights(config)
    _, grads = value_and_grad(model, tokens, weights, None)

    def weighted_sum(arrays: dict[str, np.ndarray]) -> float:
        out = np.stack([reference.gpt(config, arrays, row) for row in tokens])
        return float(np.sum(out * np.asarray(weights)))

    for name, grad in named_arrays(grads).items():
        grad, x = np.asarray(grad, np.float64), np.asarray(arrays[name], np.float64)
        direction = np.random.default_rng(0).standard_normal(x.shape)
        plus, minus = (weighted_sum({**arrays, name: x + h * direction}) for h in (1e-5, -1e-5))
        # Relative to the norm of the gradient, since its product with a direction may vanish.
        assert np.linalg.norm(grad) > 0, name
        error = np.sum(grad * direction) - (plus - minus) / 2e-5
        assert abs(error) < 2e-5 * np.linalg.norm(grad), name


def test_bfloat16_is_near_float32(model: GPT) -> None:
    """Through a cache, for its dtype: seven bits after the point, a few dozen roundings."""
    tokens = random_tokens(model.config, 2, SEQ)
    low = cast(model, jnp.bfloat16)
    found, cache = extend(low, tokens, KVCache.init(model.config, (2,), SEQ, jnp.bfloat16))
    assert found.dtype == jnp.float32
    assert {x.dtype for x in (*cache.k, *cache.v)} == {jnp.dtype(jnp.bfloat16)}
    assert norm_of_difference(found, logits(model, tokens)) < 8 * 2.0**-8


def test_position_sees_no_later_input(model: GPT) -> None:
    """By gradient: exactly zero from every later input, not zero from any other."""
    tokens = np.arange(SEQ)  # distinct, so that a row of the embedding is one position's input
    weights = np.random.default_rng(0).standard_normal(model.config.vocab_size, np.float32)
    head = model.head_weight

    @eqx.filter_jit
    @jax.jacrev
    def jacobian(inputs: jax.Array) -> jax.Array:
        table = model.wte.weight.at[tokens].set(inputs)
        hidden, _ = eqx.tree_at(lambda m: m.wte.weight, model, table).hidden(jnp.asarray(tokens))
        return hidden @ (head.T @ weights)

    from_input = np.abs(jacobian(model.wte.weight[tokens])).max(axis=-1)  # (position, input)
    later = np.triu(np.ones((SEQ, SEQ), bool), 1)
    assert (from_input[later] == 0).all()
    assert (from_input[~later] > 1e-5).all()


@pytest.mark.parametrize("chunks", [(4, 1, 1, 1), (1, 4, 1, 1)], ids=str)
def test_cached_equals_uncached(model: GPT, chunks: tuple[int, ...]) -> None:
    config = model.config
    tokens = random_tokens(config, 2, SEQ)
    expected = logits(model, tokens)
    cache = KVCache.init(config, (2,), config.block_size, jnp.float32)
    parts, start = [], 0
    for n in chunks:
        part, cache = extend(model, tokens[:, start : start + n], cache)
        parts.append(part)
        start += n
    found = np.concatenate(parts, axis=1)
    assert cache.length == SEQ
    assert norm_of_difference(found, expected) < 2e-6
    assert np.array_equal(found.argmax(-1), np.argmax(expected, -1))


def test_batch_equals_single(model: GPT) -> None:
    tokens = random_tokens(model.config, 2, 3, SEQ)
    together = logits(model, tokens)
    for index in np.ndindex(2, 3):
        assert norm_of_difference(together[index], logits(model, tokens[index])) < 2e-6


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_unroll_and_remat_change_nothing(model: GPT, remat: str) -> None:
    """Neither the logits nor the gradients, nor what is dropped."""
    config = model.config
    tokens, weights = random_tokens(config, 2, SEQ), random_weights(config)
    key = jax.random.key(2) if config.dropout else None
    (_, expected), expected_grads = value_and_grad(model, tokens, weights, key)
    other = changed(model, unroll=2, remat=remat)
    (_, found), found_grads = value_and_grad(other, tokens, weights, key)
    assert norm_of_difference(found, expected) < 2e-6
    for (name, grad), other_grad in zip(
        named_arrays(expected_grads).items(), named_arrays(found_grads).values(), strict=True
    ):
        assert norm_of_difference(other_grad, grad) < 1e-5, name


def test_dropout_follows_its_key(model: GPT) -> None:
    dropping, sure = changed(model, dropout=0.3), changed(model, dropout=0.0)
    tokens = random_tokens(model.config, 2, SEQ)
    key, other_key = jax.random.split(jax.random.key(4))
    plain, dropped = logits(sure, tokens), logits(dropping, tokens, key)
    assert np.array_equal(logits(dropping, tokens), plain)
    assert np.array_equal(logits(dropping, tokens, key), dropped)
    assert norm_of_difference(dropped, plain) > 0.01
    assert norm_of_difference(dropped, logits(dropping, tokens, other_key)) > 0.01


# Once


def test_unroll_beyond_the_layers() -> None:
    model = lively(ARCHITECTURES["gpt2"])
    tokens = random_tokens(model.config, 2, SEQ)
    found = logits(changed(model, unroll=7), tokens)
    assert norm_of_difference(found, logits(model, tokens)) < 2e-6


def test_decoding_copies_no_stack_of_layers() -> None:
    """Also where the layers are no multiple of the period."""

    def scratch(n_layer: int) -> tuple[int, int]:
        """Bytes that a step needs beside its arguments, and those of one layer's weights."""
        layers = (LayerConfig(window=3), LayerConfig(), LayerConfig())
        config = GPTConfig(
            n_layer=n_layer, n_head=2, n_embd=128, block_size=8, vocab_size=17, layers=layers
        )
        model = eqx.filter_eval_shape(GPT.init, config, key=jax.random.key(0))
        cache = eqx.filter_eval_shape(KVCache.init, config, (), 8, jnp.float32)
        step = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache))
        compiled = step.lower(model, jnp.zeros(1, jnp.int32), cache).compile()
        of_layer = sum(4 * leaf.size for leaf in jax.tree.leaves(model.blocks)) // n_layer
        return compiled.memory_analysis().temp_size_in_bytes, of_layer

    (even, of_layer), (odd, _) = scratch(12), scratch(14)
    assert odd < even + 3 * of_layer


def test_vmap_over_sequences_and_over_models() -> None:
    model = lively(ARCHITECTURES["gpt2"])
    tokens = random_tokens(model.config, 2, SEQ)
    models = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), model)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(0, None))
    @eqx.filter_vmap(in_axes=(None, 0))
    def mapped(model: GPT, row: jax.Array) -> jax.Array:
        return model(row)

    expected = [logits(jax.tree.map(lambda x, i=i: x[i], models), tokens) for i in range(2)]
    assert norm_of_difference(mapped(models, jnp.asarray(tokens)), np.stack(expected)) < 2e-6


# Where dropout acts


RATE, N_KEY = 0.3, 2000


@pytest.fixture(scope="module")
def block() -> Block:
    model = lively(dataclasses.replace(ARCHITECTURES["gpt2"], dropout=RATE))
    return jax.tree.map(lambda x: x[0], model.blocks)


def zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def silenced(block: Block, branch: str) -> Block:
    """The block with a branch that adds nothing."""
    where = {"attention": lambda b: b.attention.out, "mlp": lambda b: b.mlp.down}[branch]
    return eqx.tree_at(where, block, replace_fn=zeros)


def check_mean(samples: jax.Array, expected: jax.Array) -> None:
    """The mean over the first axis is the expected one, within what its spread allows."""
    error = np.std(samples, axis=0) / math.sqrt(len(samples))
    assert (np.abs(np.mean(samples, axis=0) - expected) < 5 * error + 1e-5).all()


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_dropout_of_a_branch_keeps_its_mean(block: Block, branch: str) -> None:
    """Each branch is linear in what is dropped in it, so the mean is exact."""
    alone = silenced(block, {"attention": "mlp", "mlp": "attention"}[branch])
    x = jax.random.normal(jax.random.key(0), (5, 21), jnp.float32)
    run = eqx.filter_jit(eqx.filter_vmap(lambda key: alone(x, key=key)[0] - x))
    added = run(jax.random.split(jax.random.key(1), N_KEY))
    check_mean(added, alone(x)[0] - x)
    n = added.size
    assert abs(np.mean(added == 0) - RATE) < 5 * math.sqrt(RATE * (1 - RATE) / n)


def test_dropout_of_attention_weights(block: Block) -> None:
    attention: Attention = block.attention
    x = jax.random.normal(jax.random.key(0), (5, 21), jnp.float32)
    run = eqx.filter_jit(eqx.filter_vmap(lambda key: attention(x, key=key)[0]))
    mixed = run(jax.random.split(jax.random.key(1), N_KEY))
    check_mean(mixed, attention(x)[0])
    assert (np.std(mixed, axis=0) > 0).all()


@pytest.mark.parametrize(("rate", "of_weights"), [(RATE, 0.0), (0.0, RATE), (RATE, None)])
def test_attention_weights_can_have_a_dropout_of_their_own(
    block: Block, rate: float, of_weights: float | None
) -> None:
    config = dataclasses.replace(block.config, dropout=rate, attention_dropout=of_weights)
    attention = dataclasses.replace(block.attention, config=config)
    x = jax.random.normal(jax.random.key(0), (5, 21), jnp.float32)
    drops = bool((attention(x, key=jax.random.key(1))[0] != attention(x)[0]).any())
    assert drops == (of_weights != 0)
    whole = dataclasses.replace(block, config=config, attention=attention)
    assert (whole(x, key=jax.random.key(1))[0] != whole(x)[0]).any()


def test_dropout_of_the_embedding() -> None:
    model = lively(dataclasses.replace(ARCHITECTURES["llama"], dropout=RATE))
    model = eqx.tree_at(
        lambda m: (m.blocks.attention.out, m.blocks.mlp.down),
        model,
        replace_fn=zeros,
    )
    run = eqx.filter_jit(lambda tokens, key: model.hidden(tokens, key=key)[0])
    hidden = run(jnp.asarray(random_tokens(model.config, 211, SEQ)), jax.random.key(0))
    zero = np.asarray(hidden == 0)  # an rms norm keeps zeros
    assert abs(zero.mean() - RATE) < 5 * math.sqrt(RATE * (1 - RATE) / zero.size)


def test_every_dropout_draws_its_own() -> None:
    """Each of the four branches adds one, or nothing: the sums show whether two go together."""
    config = dataclasses.replace(ARCHITECTURES["gpt2"], dropout=RATE)
    model = eqx.tree_at(lambda m: m.norm, lively(config), Norm.init(config.norm, 21))
    silent = (model.wte, model.wpe, model.blocks.attention.out, model.blocks.mlp.down)
    model = eqx.tree_at(
        lambda m: (m.wte, m.wpe, m.blocks.attention.out, m.blocks.mlp.down), model, zeros(silent)
    )
    model = eqx.tree_at(
        lambda m: (m.blocks.attention.out.bias, m.blocks.mlp.down.bias),
        model,
        replace_fn=jnp.ones_like,
    )
    tokens = jnp.zeros((101, SEQ), jnp.int32)
    hidden = eqx.filter_jit(lambda key: model.hidden(tokens, key=key)[0])(jax.random.key(0))
    sums = [len(np.unique(np.round(x, 3))) for x in np.reshape(hidden, (-1, 21))]
    assert max(sums) == 5


# The tied head


def test_tied_head_is_one_leaf_with_both_gradients() -> None:
    tied = lively(ARCHITECTURES["gpt2"])
    assert tied.head is None
    shapes = [x.shape for x in jax.tree.leaves(tied)]
    assert shapes.count(tied.wte.weight.shape) == 1
    config = dataclasses.replace(tied.config, head="untied")
    head = Linear(tied.wte.weight, None)
    untied = GPT(tied.wte, tied.wpe, tied.blocks, tied.norm, head, config)
    tokens, weights = random_tokens(config, 2, SEQ), random_weights(config)
    _, together = value_and_grad(tied, tokens, weights, None)
    _, apart = value_and_grad(untied, tokens, weights, None)
    assert apart.head is not None
    assert norm_of_difference(together.wte.weight, apart.wte.weight + apart.head.weight) < 1e-6
    assert np.linalg.norm(apart.wte.weight) > 0


def test_initialisation_is_gpt2s_and_follows_its_key() -> None:
    config = GPTConfig(n_layer=5, n_head=2, n_embd=46, block_size=61, vocab_size=127, head="untied")
    residual = 0.02 / math.sqrt(2 * 5)
    model, again, other = (GPT.init(config, key=jax.random.key(i)) for i in (0, 0, 1))
    assert eqx.tree_equal(model, again)
    assert not np.array_equal(model.wte.weight, other.wte.weight)
    arrays = named_arrays(model)
    for name, x in arrays.items():
        if name.endswith("bias"):
            assert (x == 0).all(), name
        elif "norm" in name:
            assert (x == 1).all(), name
        else:
            std = residual if "attention.out" in name or "mlp.down" in name else 0.02
            for part in x if name.startswith("blocks") else [x]:
                n = part.size
                assert abs(np.std(part) / std - 1) < 5 / math.sqrt(2 * n), name
                assert abs(np.mean(part)) < 5 * std / math.sqrt(n), name
                # A normal fourth moment, 3, has a standard error of sqrt(96 / n).
                assert abs(np.mean((part / std) ** 4) - 3) < 5 * math.sqrt(96 / n), name
    random = [part for name, x in arrays.items() if name.endswith("weight") and "norm" not in name
              for part in (x if name.startswith("blocks") else [x])]  # fmt: skip
    assert len({float(part.ravel()[0]) for part in random}) == len(random)


def test_with_config_refuses_other_arrays() -> None:
    model = lively(ARCHITECTURES["gpt2"])
    with pytest.raises(KeyError, match=r"head\.weight"):
        changed(model, head="untied")
    with pytest.raises(KeyError, match=r"norm.*\.bias"):
        changed(model, norm=eqx_gpt.NormConfig(bias=False))
    with pytest.raises(ValueError, match=r"wpe\.weight: expected shape \(17, 21\), got \(13, 21\)"):
        changed(model, block_size=17)


# The public door


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (np.zeros(3, np.float32), TypeError, "must be integers, got float32; give token ids"),
        ([0.0, 1.0], TypeError, "must be integers, got float64; give token ids"),
        (np.array([True, False]), TypeError, "must be integers, got bool"),
        ("text", TypeError, "must be integers, got <U4"),
        (np.int32(3), ValueError, r"\(\*batch, seq\), got a scalar; .* tokens\[None\]"),
        ([], ValueError, r"shape \(0,\) are empty; give at least one token"),
        (np.zeros((2, 0), np.int32), ValueError, r"shape \(2, 0\) are empty; give at least one"),
        (np.zeros((0, 2), np.int32), ValueError, r"shape \(0, 2\) are empty; give at least one"),
        (
            np.zeros((2, 14), np.int32),
            ValueError,
            r"\(2, 14\) are 14 long; .*block_size=13; give the last 13, tokens\[\.\.\., -13:\]",
        ),
        ([0, -1], ValueError, "token -1 lies outside the vocabulary, 0 to 30; .*tokenizer"),
        ([0, 31], ValueError, "token 31 lies outside the vocabulary, 0 to 30; .*tokenizer"),
        (np.array([2**32 + 1]), ValueError, "token 4294967297 lies outside the vocabulary"),
    ],
    ids=repr,
)
def test_refused_tokens(tokens: object, error: type[Exception], message: str) -> None:
    model = lively(ARCHITECTURES["gpt2"])
    with pytest.raises(error, match=message):
        model(tokens)
    cache = KVCache.init(model.config, (), 13, jnp.float32)
    with pytest.raises(error, match=message):
        model.extend(tokens, cache)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_any_integers_are_tokens(dtype: type) -> None:
    found = check_tokens(np.array([[1, 2, 30]], dtype), ARCHITECTURES["gpt2"])
    assert found.dtype == jnp.int32
    assert found.tolist() == [[1, 2, 30]]


def test_shape_and_dtype_are_checked_inside_jit_the_vocabulary_is_not() -> None:
    model = lively(ARCHITECTURES["gpt2"])
    with pytest.raises(TypeError, match="must be integers"):
        logits(model, jnp.zeros(3, jnp.float32))
    with pytest.raises(ValueError, match="are 14 long"):
        logits(model, jnp.zeros(14, jnp.int32))
    assert logits(model, jnp.array([31], jnp.int32)).shape == (1, 31)
