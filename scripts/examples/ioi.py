"""Indirect-object identification, as Wang et al. 2022 (arXiv:2211.00593) took it apart.

"When John and Mary went to the store, Mary gave a drink to": which heads say "John", and which
tell them whom not to name? `python scripts/examples/ioi.py` prints and draws it.
"""

import itertools
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

NAMES = ["John", "Mary", "Tom", "Sarah", "Michael", "Emma", "David", "Anna", "Mark", "Alice"]
TEXT = "When {} and {} went to the store, {} gave a drink to"


@dataclass(frozen=True)
class Arguments:
    """Which heads name the indirect object: direct attribution, attention and path patching."""

    init_from: str = "smollm2-135m-instruct"
    """A model of the zoo, a hub id, a local directory, a .gguf file."""
    out: str = "ioi.png"
    """The picture."""
    pairs: int = 4
    """Pairs of names; each makes two prompts, by the order of the names."""


def main() -> int:
    options = parse(Arguments)
    source = model_source(options.init_from, "")

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np

    from eqx_gpt import inspect
    from eqx_gpt.attribution import attribute
    from eqx_gpt.paths import PathPatching
    from eqx_gpt.pictures import heads_picture

    model, tokenizer = source()
    known = [name for name in NAMES if len(tokenizer.encode(f" {name}")) == 1]
    if not (options.pairs >= 1 and len(known) >= 3):
        raise ValueError(
            f"needs pairs >= 1 (got {options.pairs}) and 3 names of one token: {known}"
        )
    pairs = list(itertools.pairwise(known))[: options.pairs]
    texts = [(io, s, s) for io, s in pairs] + [(s, io, s) for io, s in pairs]
    # The same without the task: a third person gives.
    others = [(a, b, next(c for c in known[::-1] if c not in (a, b))) for a, b, _ in texts]
    clean, other = (
        np.array([tokenizer.encode(TEXT.format(*names)) for names in some])
        for some in (texts, others)
    )
    io, s = (np.array([tokenizer.encode(f" {pair[i]}")[0] for pair in pairs] * 2) for i in (0, 1))
    shape, rows = (model.config.n_layer, model.config.n_head), np.arange(len(clean))

    def differences(logits: "jax.Array") -> "jax.Array":
        return logits[rows, -1, io] - logits[rows, -1, s]

    @eqx.filter_jit
    def sweep(model: "GPT", readers: "jax.Array | None") -> "jax.Array":
        """The mean difference when one head speaks of the other prompt: to the logits, or to the
        queries of the readers. For every head."""
        patching = PathPatching.init(model, clean, other)

        def patched(sender: "jax.Array") -> "jax.Array":
            if readers is None:
                return differences(patching.to_logits(model, sender)).mean()
            return differences(patching.to_heads(model, sender, readers, "q")).mean()

        senders = jnp.eye(shape[0] * shape[1], dtype=bool).reshape(-1, *shape)
        return jax.lax.map(patched, senders).reshape(shape)

    weights = "blocks.*.attention.weights"
    logits, seen = eqx.filter_jit(inspect.run)(model, clean, capture=(weights,))
    plain = differences(logits)
    print(f"the right name is ahead in {(plain > 0).sum()} of {len(rows)}, by {plain.mean():.2f}")

    last = np.asarray(seen[weights])[:, :, :, -1]  # layer, prompt, head, position
    first_io = np.argmax(clean == io[:, None], axis=1)
    second_s = clean.shape[1] - 1 - np.argmax(clean[:, ::-1] == s[:, None], axis=1)
    to_io, to_s = (last[:, rows, :, where].mean(axis=0) for where in (first_io, second_s))
    share = np.asarray(eqx.filter_jit(attribute)(model, clean, io, minus=s).heads.mean(axis=-1))
    to_logits = np.asarray(sweep(model, None) - plain.mean())
    named = share * (to_io > 0.25)  # what heads say while they look at the right name
    movers = inspect.head_mask(model.config, _largest(named, 5))
    to_movers = np.asarray(sweep(model, jnp.asarray(movers)) - plain.mean())

    groups = {
        "name movers: they look at the right name and say it": _largest(named, 5),
        "negative movers: they look at it and say the contrary": _largest(-named, 2),
        "suppressors: without them the movers' queries are wrong": _largest(-to_movers, 4),
    }
    for title, heads in groups.items():
        print(f"\n{title}\n  head  share  patched to logits, to movers  looks at IO, at second S")
        for head in heads:
            name, attention = "{}.{}".format(*head), f"{to_io[head]:9.2f} {to_s[head]:12.2f}"
            changes = f"{to_logits[head]:15.2f} {to_movers[head]:12.2f}"
            print(f"  {name:5} {share[head]:+5.2f} {changes} {attention}")
    pictures = {"share in the logit": share, "path to the logits": to_logits}
    figure = heads_picture({**pictures, "path to the movers' queries": to_movers}, "logits")
    figure.savefig(options.out)
    return 0


def _largest(values: "np.ndarray", n: int) -> "list[tuple[int, int]]":
    """(layer, head) of the largest n above 0."""
    order = values.ravel().argsort()[::-1][:n]
    heads = [divmod(int(i), values.shape[1]) for i in order]
    return [head for head in heads if values[head] > 0]


if __name__ == "__main__":
    sys.exit(run_command(main))
