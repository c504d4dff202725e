"""Windows of whole documents: what is in them, and that training on them is exact."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_messages import TOKENIZER, make

from eqx_gpt import GPT, GPTConfig
from eqx_gpt.ops.cross_entropy import cross_entropy
from eqx_gpt.tree import named_arrays
from train.config import TrainConfig
from train.evaluate import answers_loss, dataset_measures, sampled_loss
from train.loop import train
from train.loss import next_token_loss
from train.manifest import BEGINS, LEARNT
from train.packing import Packed, PackedWindows, best_fit, micro_batches
from train.run import RunError
from train.step import Gradients, Recipe, TrainState, add_gradients, apply_gradients, train_step

BLOCK = 19
LENGTHS = (7, 13, 20, 3, 31, 5, 2, 11, 9, 6)
NOTHING_LEARNT = 7  # which document
pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=14, block_size=BLOCK, vocab_size=97)


def documents():
    """Tokens that all differ, a third of them learnt, and their flags."""
    flags = np.zeros(sum(LENGTHS), np.uint8)
    rng = np.random.default_rng(0)
    for i, (begin, length) in enumerate(zip(np.cumsum([0, *LENGTHS]), LENGTHS, strict=False)):
        if i != NOTHING_LEARNT:
            flags[begin + 1 : begin + length] = rng.random(length - 1) < 0.3
            flags[begin + 1] = LEARNT
        flags[begin] = BEGINS
    return np.arange(1, len(flags) + 1, dtype=np.uint16), flags  # padding is 0


@pytest.fixture
def windows():
    return PackedWindows(*documents(), BLOCK, seed=1)


def test_best_fit_loses_nothing_and_leaves_little_room():
    lengths = np.random.default_rng(0).integers(1, 102, 997)
    packed = best_fit(lengths, 101)
    assert sorted(i for window in packed for i in window) == list(range(997))
    assert max(lengths[window].sum() for window in packed) <= 101
    assert len(packed) <= 1.05 * lengths.sum() / 101


def test_a_window_holds_whole_documents(windows):
    """Each that fits stands in one window of an epoch, whole, with its flags and its beginning."""
    tokens, flags = documents()
    batch = windows.batch(0, windows.per_epoch)
    begins = np.cumsum([0, *LENGTHS[:-1]]).tolist()
    seen = []
    for row, weights, starts in zip(*batch, strict=True):
        at = 0
        while at <= BLOCK and row[at]:
            begin = int(row[at]) - 1
            document = begins.index(begin)
            length = min(LENGTHS[document], BLOCK + 1)
            assert (row[at : at + length] == tokens[begin:][:length]).all()
            assert (starts[at : at + length] == at).all()
            expected = flags[begin:][:length] == LEARNT
            assert ((weights > 0)[at : at + length - 1] == expected[1:]).all()
            if at:
                assert weights[at - 1] == 0  # of the token that follows another document's last
            seen.append(document)
            at += length
        assert not weights[max(at - 1, 0) :].any()
        assert (starts[at:] == at).all()
    assert sorted(seen) == [i for i in range(len(LENGTHS)) if i != NOTHING_LEARNT]
    assert windows.n_cut == 1


def test_an_epoch_draws_every_window_once_however_it_is_cut_into_batches(windows):
    n = windows.per_epoch
    whole = windows.batch(0, 3 * n).tokens
    assert (np.concatenate([windows.batch(i, 1).tokens for i in range(3 * n)]) == whole).all()
    epochs = [sorted(map(tuple, part)) for part in np.split(whole, 3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len({part.tobytes() for part in np.split(whole, 3)}) > 1
    other = dataclasses.replace(windows, seed=2).batch(0, 3 * n).tokens
    assert (other != whole).any()


def test_nothing_to_learn_is_refused():
    tokens, flags = documents()
    with pytest.raises(ValueError, match="no document of the split has a token to learn"):
        PackedWindows(tokens, flags & BEGINS, BLOCK, seed=0)


@pytest.mark.parametrize("chunk", [2**26, 97 * 5], ids=["one chunk", "chunks of 5 tokens"])
@pytest.mark.parametrize("tile", [2048, 16], ids=["whole", "tiles"])
def test_weighted_cross_entropy(chunk, tile, monkeypatch):
    monkeypatch.setattr("eqx_gpt.ops.cross_entropy._CHUNK_LOGITS", chunk)
    monkeypatch.setattr("eqx_gpt.ops.cross_entropy._TILED_CHUNK_BYTES", 4 * chunk)
    monkeypatch.setattr("eqx_gpt.ops.head_tiles._TILE", tile)
    rng = np.random.default_rng(0)
    hidden, weight = rng.standard_normal((2, 11, 7)), rng.standard_normal((97, 7))
    targets, weights = rng.integers(0, 97, (2, 11)), rng.random((2, 11))

    def exact(hidden, weight):
        logits = hidden @ weight.T
        lse = np.log(np.exp(logits).sum(-1))
        at = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return np.mean(weights * (lse - at))

    f32 = [jnp.asarray(x, jnp.float32) for x in (hidden, weight)]
    run = lambda h, w: cross_entropy(  # noqa: E731
        h, w, jnp.asarray(targets), None, None, jnp.asarray(weights, jnp.float32)
    )
    assert float(run(*f32)) == pytest.approx(exact(hidden, weight), rel=1e-6)
    loss, gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(*f32)
    assert float(loss) == pytest.approx(exact(hidden, weight), rel=1e-6)
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        ahead, behind = (
            exact(*(x + h * direction if i == j else x for j, x in enumerate((hidden, weight))))
            for h in (1e-5, -1e-5)
        )
        assert np.sum(np.asarray(gradient, np.float64) * direction) == pytest.approx(
            (ahead - behind) / 2e-5, rel=1e-4
        )


def mean_over_answers(model):
    """The mean loss of the tokens learnt, of documents that each have a window of their own."""
    tokens, flags = documents()
    rows, learnt = np.zeros((2, len(LENGTHS), BLOCK + 1), np.int32)
    for row, begin in enumerate(np.cumsum([0, *LENGTHS[:-1]])):
        length = min(LENGTHS[row], BLOCK + 1)
        rows[row, :length] = tokens[begin : begin + length] % 97
        learnt[row, :length] = flags[begin : begin + length] & LEARNT
    log_p = jax.nn.log_softmax(model(jnp.asarray(rows[:, :-1])))
    losses = -jnp.take_along_axis(log_p, jnp.asarray(rows[:, 1:, None]), axis=-1)[..., 0]
    return jnp.sum(losses * learnt[:, 1:].astype(np.float32)) / learnt.sum().astype(np.float32)


@pytest.fixture(scope="module")
def setup():
    model = GPT.init(CONFIG, key=jax.random.key(0))
    optimizer = optax.sgd(0.1)
    return model, Recipe(optimizer, jnp.dtype(jnp.float32), jax.random.key(1)), optimizer


@pytest.fixture(scope="module")
def expected(setup):
    """The mean over answers, and its gradient."""
    return eqx.filter_jit(eqx.filter_value_and_grad(mean_over_answers))(setup[0])


def test_a_step_is_that_of_the_mean_over_all_answers(windows, setup, expected):
    """The whole data in one batch: as micro-batches of one window, on the device and from the
    host, whose tokens to learn are unlike in number, against every document alone."""
    model, recipe, optimizer = setup
    n = windows.per_epoch
    batch = windows.batch(0, n)
    batch = jax.tree.map(jnp.asarray, batch._replace(tokens=batch.tokens % 97))
    counts = np.count_nonzero(batch.weights, axis=1)
    assert len(set(counts.tolist())) > 1

    expected_loss, gradient = expected
    micro = micro_batches(batch, n)
    state = jax.tree.map(jnp.copy, TrainState.init(model, optimizer))
    on_device, device_metrics = train_step((recipe, micro), state)
    state = jax.tree.map(jnp.copy, TrainState.init(model, optimizer))
    gradients = Gradients.zero(state.params)
    for i in range(n):
        part = jax.tree.map(lambda x, i=i: x[i], micro)
        gradients = add_gradients((recipe, part, state), gradients)
    from_host, host_metrics = apply_gradients(recipe, gradients, state)
    for found, metrics in ((on_device, device_metrics), (from_host, host_metrics)):
        assert float(metrics.loss) == pytest.approx(float(expected_loss), rel=2e-6)
        size = float(optax.tree.norm(gradient))
        assert float(metrics.grad_norm) == pytest.approx(size, rel=1e-5)
        for name, g in named_arrays(gradient).items():
            moved = np.asarray(named_arrays(found.model)[name]) - named_arrays(model)[name]
            assert np.linalg.norm(moved + 0.1 * g) < 1e-6 * size, name


def test_evaluation_is_over_all_answers(windows, setup, expected):
    model, tokens, flags = setup[0], *documents()
    windows = dataclasses.replace(windows, tokens=tokens % 97)
    options = {"dtype": jnp.float32, "progress": lambda done, total: None}
    expected = float(expected[0])
    loss, count = answers_loss(model, windows, micro_batch_size=2, **options)
    assert loss == pytest.approx(expected, rel=2e-6)
    begins = np.cumsum([0, *LENGTHS])[LENGTHS.index(31)]
    assert count == np.sum(flags & LEARNT) - np.sum(flags[begins + BLOCK + 1 : begins + 31])
    n = windows.per_epoch
    for batch_size in (1, n):
        sampled = sampled_loss(
            model, windows, batch_size=batch_size, n_batch=n, micro_batch_size=1, **options
        )
        assert sampled == pytest.approx(expected, rel=2e-6)


def test_eval_py_measures_the_answers(tmp_path, setup):
    data = make(tmp_path, val_fraction=0.3)
    config = dataclasses.replace(CONFIG, vocab_size=data.vocab_size, block_size=101)
    model = GPT.init(config, key=jax.random.key(0))
    options = {"block_size": 101, "micro_batch_size": 3, "dtype": jnp.float32}
    options["progress"] = lambda done: None
    found = dataset_measures(model, data, "val", stride=None, **options)
    assert found["tokens"] == data.splits["val"].flags.learnt
    assert found["bits_per_byte"] is None
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert found["loss"] == pytest.approx(np.log(data.vocab_size), rel=0.05)
    with pytest.raises(ValueError, match="stride=7 does not apply to 'mine', conversations"):
        dataset_measures(model, data, "val", stride=7, **options)
    with pytest.raises(ValueError, match="block_size=102 is outside 1 to the model's 101"):
        dataset_measures(model, data, "val", stride=None, **options | {"block_size": 102})


def test_no_weights_and_no_starts_are_a_plain_window(setup):
    plain = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, BLOCK + 1)), jnp.int32)
    assert float(next_token_loss(setup[0], plain)) == float(
        next_token_loss(setup[0], Packed(plain))
    )


def test_a_run_learns_the_answers_and_resumes_exactly(tmp_path):
    data = make(tmp_path, val_fraction=0.3)
    settings = {
        "n_layer": 1, "n_head": 2, "n_embd": 14, "block_size": 101, "batch_size": 4,
        "gradient_accumulation_steps": 2, "micro_batch_size": 2, "max_iters": 16,
        "warmup_iters": 2, "learning_rate": 0.03, "eval_interval": 8, "eval_iters": 2,
        "checkpoint_interval": 8, "precision": "float32", "dataset": "mine", "decay_lr": False,
    }  # fmt: skip
    config = TrainConfig(**settings, data_dir=str(tmp_path), out_dir=str(tmp_path / "whole"))
    whole = train(config, data)
    assert whole.val_loss < 2.0 < np.log(TOKENIZER.vocab_size) - 2
    half = dataclasses.replace(config, out_dir=str(tmp_path / "half"), max_iters=8)
    train(half, data)
    resumed = train(dataclasses.replace(half, max_iters=16), data, resume=True)
    assert resumed.val_loss == whole.val_loss
    split = data.splits["train"]
    flags = dataclasses.replace(split.flags, sha256="0" * 64)
    splits = data.splits | {"train": dataclasses.replace(split, flags=flags)}
    other = dataclasses.replace(data, splits=splits)
    with pytest.raises(RunError, match="train split of dataset 'mine' had other answers"):
        train(dataclasses.replace(half, max_iters=20), other, resume=True)
