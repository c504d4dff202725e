"""Induction heads (Olsson et al. 2022, arXiv:2209.11895), in a model trained here in a minute.

Random tokens that begin again after a while: what follows a token the second time followed it the
first time. Two layers learn to look there. `python scripts/examples/induction.py`.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

# The repository, in place of this directory.
sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from scripts.environment import prepare_process  # noqa: E402

prepare_process(__name__)  # may start this anew, so it comes before the slow imports

from scripts.common import parse, run_command  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Trains two layers on repeated random tokens, then finds and removes the heads that do it."""

    out: str = "induction.png"
    """The picture."""
    max_iters: int = 2000
    """Training steps."""
    seed: int = 1337
    """Of the weights and the sequences."""


def main() -> int:
    options = parse(Arguments)

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from eqx_gpt import GPT, GPTConfig, PositionConfig, inspect
    from eqx_gpt.pictures import attention_picture
    from scripts.examples.repeated import second_half_loss
    from train.step import Recipe, TrainState, train_step

    half, vocab = 24, 64
    config = GPTConfig(
        n_layer=2, n_head=4, n_embd=64, block_size=2 * half, vocab_size=vocab,
        position=PositionConfig("rope"),
    )  # fmt: skip
    rng = np.random.default_rng(options.seed)

    def repeated(batch: int, shortest: int) -> np.ndarray:
        """Of periods that vary, or else looking back a fixed way would do."""
        once = rng.integers(0, vocab, (batch, half), np.int32)
        periods = rng.integers(shortest, half + 1, (batch, 1))
        return np.take_along_axis(once, np.arange(2 * half) % periods, axis=1)

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, options.max_iters))
    state = TrainState.init(GPT.init(config, key=jax.random.key(options.seed)), optimizer)
    recipe = Recipe(optimizer, jnp.float32, jax.random.key(0))
    start = time.perf_counter()
    for step in range(options.max_iters):
        state, metrics = train_step((recipe, jnp.asarray(repeated(64, half // 2)[None])), state)
        if (step + 1) % 250 == 0:
            per_step = (time.perf_counter() - start) / (step + 1)
            left = per_step * (options.max_iters - step - 1)
            print(f"step {step + 1} loss {metrics.loss:.3f} eta {left:.0f} s", file=sys.stderr)
    model, tokens = state.model, repeated(32, half)

    @eqx.filter_jit
    def loss_without(model: GPT, mask: "jax.Array | np.ndarray") -> jax.Array:
        """Nats a token where it can be known, with some heads silent."""
        edits = {"blocks.*.attention.heads": inspect.ReplaceHeads(mask)}
        logits, _ = inspect.run(model, tokens, edits=edits)
        return second_half_loss(logits, jnp.asarray(tokens))

    _, seen = eqx.filter_jit(inspect.run)(model, tokens, capture=("blocks.*.attention.weights",))
    weights = np.asarray(seen["blocks.*.attention.weights"])
    queries = np.arange(half + 1, 2 * half)  # of the second half
    scores = {
        "looks at the token before": weights[..., queries, queries - 1].mean(axis=(1, 3)),
        "looks behind the token's first time": weights[..., queries, queries - half + 1].mean(
            axis=(1, 3)
        ),
    }
    nobody = inspect.head_mask(config, [])
    print(f"loss of the second half: {loss_without(model, nobody):.3f} nats a token")
    pictures = {}
    for what, score in scores.items():
        layer, head = (int(i) for i in np.unravel_index(score.argmax(), score.shape))
        loss = loss_without(model, inspect.head_mask(config, [(layer, head)]))
        print(f"head {layer}.{head} {what}: {score[layer, head]:.2f}; without it, {loss:.3f}")
        pictures[f"head {layer}.{head}: {what}"] = weights[layer, 0, head]
    attention_picture(pictures, [str(token) for token in tokens[0]]).savefig(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
