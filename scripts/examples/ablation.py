"""Every head of a model silenced in turn: which one does it need to repeat what it has read?

`python scripts/examples/ablation.py`, of SmolLM2-135M unless told otherwise.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# The repository, in place of this directory.
sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from scripts.environment import prepare_process  # noqa: E402

prepare_process(__name__)  # may start this anew, so it comes before the slow imports

from scripts.common import model_source, parse, run_command  # noqa: E402

if TYPE_CHECKING:
    import jax
    import numpy as np

    from eqx_gpt import GPT


@dataclass(frozen=True)
class Arguments:
    """The loss on the second half of repeated random tokens, without each head."""

    init_from: str = "smollm2-135m-instruct"
    """A model of the zoo, a hub id, a local directory, a .gguf file."""
    out: str = "ablation.png"
    """The picture."""
    half: int = 24
    """Random tokens, which then come once more."""


def main() -> int:
    options = parse(Arguments)
    source = model_source(options.init_from, "")

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np

    from eqx_gpt import inspect
    from eqx_gpt.pictures import heads_picture
    from scripts.examples.repeated import second_half_loss

    model, _ = source()
    config, half, name = model.config, options.half, "blocks.*.attention.heads"
    random = np.random.default_rng(0).integers(0, config.real_vocab_size, (4, half), np.int32)
    tokens = np.tile(random, (1, 2))

    @eqx.filter_jit
    def losses(model: "GPT", masks: "np.ndarray") -> "jax.Array":
        """Nats a token of the second half, once a mask: its heads say what they say on average."""
        _, seen = inspect.run(model, tokens, capture=[name])
        average = seen[name].mean(axis=(1, 2))

        def loss(mask: jax.Array) -> jax.Array:
            edits = {name: inspect.ReplaceHeads(mask, average)}
            logits, _ = inspect.run(model, tokens, edits=edits)
            return second_half_loss(logits, jnp.asarray(tokens))

        return jax.lax.map(loss, masks)

    shape = (config.n_layer, config.n_head)
    each = np.eye(shape[0] * shape[1], dtype=bool).reshape(-1, *shape)
    plain = losses(model, np.zeros((1, *shape), bool))[0]
    rise = np.asarray(losses(model, each) - plain).reshape(shape)
    print(f"loss of the second half: {plain:.3f} nats a token")
    for index in rise.ravel().argsort()[::-1][:5]:
        layer, head = divmod(int(index), shape[1])
        print(f"without head {layer}.{head}: {plain + rise[layer, head]:.3f}")
    heads_picture({"rise of the loss without the head": rise}, "nats a token").savefig(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
