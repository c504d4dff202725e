"""The loss of a split: every token once, in the context that the policy promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from architectures import ARCHITECTURES, lively, random_tokens
from tiny_run import command, run

from eqx_gpt import score
from eqx_gpt.tree import named_arrays
from train import evaluate
from train.evaluate import measures, split_loss

HEADS = ("gpt2", "no_bias", "gptj", "gemma2")  # tied, of a padded vocabulary, biased, capped


@pytest.fixture(scope="module")
def model(quick_compilation):
    return lively(ARCHITECTURES["gpt2"])


def log_p(model, tokens):
    """(seq, vocab) in float64: of the token after each."""
    arrays = {name: np.asarray(x) for name, x in named_arrays(model).items()}
    logits = reference.gpt(model.config, arrays, np.asarray(tokens))
    return np.log(reference.softmax(logits))


def guide(model, tokens, max_length, stride):
    """The loop of transformers' perplexity guide, but a mean over the tokens that it scores."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        n_scored = min(end - previous_end, end - begin - 1)  # the first has no prediction
        at = np.arange(end - begin - 1 - n_scored, end - begin - 1)
        window = tokens[begin:end]
        total -= log_p(model, window)[at, window[at + 1]].sum()
        count, previous_end = count + n_scored, end
        if end == len(tokens):
            break
    return total / count, count


def measured(model, tokens, **policy):
    seen = []
    loss = split_loss(
        model, tokens, **{"dtype": jnp.float32, **policy},
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == sorted(seen)
    assert seen[-1] == (len(tokens) - 1, len(tokens) - 1)
    return loss


@pytest.mark.parametrize(
    ("n_token", "block_size", "stride", "rows"),
    [
        (53, 11, 3, 4),  # the last window, and the last batch, only in part
        (53, 11, 1, 50),
        (53, 7, 5, 1),
        (47, 11, 11, 3),  # blocks
        (12, 11, 2, 3),  # one window, exactly
        (13, 11, 2, 3),
        (5, 11, 2, 3),
        (2, 1, 1, 1),
    ],
)
def test_sliding_window(model, n_token, block_size, stride, rows):
    tokens = np.asarray(random_tokens(model.config, n_token), np.uint16)
    loss, count = measured(
        model, tokens, block_size=block_size, stride=stride, micro_batch_size=rows
    )
    if stride == block_size:
        blocks = [tokens[i : i + block_size + 1] for i in range(0, n_token - 1, block_size)]
        losses = [-log_p(model, x)[np.arange(len(x) - 1), x[1:]] for x in blocks]
        expected = np.concatenate(losses).mean(), n_token - 1
        again = measured(model, tokens, block_size=block_size, micro_batch_size=rows)
        assert again == (loss, count)
    else:
        expected = guide(model, tokens, block_size + 1, stride)
    assert count == n_token - 1 == expected[1]
    assert loss == pytest.approx(expected[0], rel=2e-6)


@pytest.mark.parametrize("name", HEADS)
def test_scores(name, monkeypatch, quick_compilation):
    """In several chunks, the last of them not full; any leading dimensions."""
    model = lively(ARCHITECTURES[name])
    monkeypatch.setattr(score, "_CHUNK_LOGITS", 5 * model.config.vocab_size)
    windows = jnp.asarray(random_tokens(model.config, 2, 3, 8))
    hidden, _ = model.hidden(windows[..., :-1])
    found = score.token_scores(model, hidden, windows[..., 1:])
    assert found.logprob.dtype == jnp.float32
    for i, j in np.ndindex(2, 3):
        expected = log_p(model, windows[i, j, :-1])
        assert found.likeliest[i, j].tolist() == expected.argmax(-1).tolist()
        np.testing.assert_allclose(
            found.logprob[i, j], expected[np.arange(7), windows[i, j, 1:]], rtol=0, atol=2e-5
        )


def test_precision(model):
    """bfloat16 computes what a model of bfloat16 weights does."""
    tokens = np.asarray(random_tokens(model.config, 31), np.uint16)
    policy = {"block_size": 5, "micro_batch_size": 2}
    half, _ = measured(model, tokens, dtype="bfloat16", **policy)
    full, _ = measured(model, tokens, **policy)
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_measures():
    found = measures(np.log(8), 10, 15)
    assert found == pytest.approx({"loss": np.log(8), "perplexity": 8, "bits_per_byte": 2})


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"block_size": 14}, "block_size=14 is outside 1 to the model's 13"),
        ({"block_size": 0}, "block_size=0 is outside"),
        ({"block_size": 7, "stride": 8}, "stride=8 is outside 1 to block_size=7"),
        ({"block_size": 7, "stride": 0}, "stride=0 is outside 1 to block_size=7"),
        ({"block_size": 7, "micro_batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_a_policy_that_cannot_be(policy, words, model):
    with pytest.raises(ValueError, match=words):
        measured(model, np.arange(20), **{"micro_batch_size": 1, **policy})


def test_a_split_with_nothing_to_predict(model):
    with pytest.raises(ValueError, match="a split of 1 tokens has none to predict"):
        measured(model, np.arange(1), block_size=3, micro_batch_size=1)


def test_one_program_for_all_batches(model, monkeypatch):
    """But for the first window, which counts whole."""
    traced = []
    plain = evaluate.token_scores
    monkeypatch.setattr(
        evaluate, "token_scores", lambda *args: traced.append(args[2].shape) or plain(*args)
    )
    jax.clear_caches()
    tokens = np.asarray(random_tokens(model.config, 53), np.uint16)
    measured(model, tokens, block_size=5, stride=2, micro_batch_size=4)
    assert traced == [(1, 5), (4, 2)]


def test_without_the_harness(tmp_path, monkeypatch):
    """One line says what to install, before any model is looked for."""
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError('No module named lm_eval')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run(command("lm_eval.py", init_from="no/model", tasks="some"), tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("lm_eval: eqx_gpt.harness needs lm-evaluation-harness")
    assert "pip install 'eqx-gpt[lm-eval]'" in line
