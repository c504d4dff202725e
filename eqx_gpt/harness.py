"""Any of our models as a model of lm-evaluation-harness (`pip install eqx-gpt[lm-eval]`).

    from lm_eval import simple_evaluate
    simple_evaluate(HarnessLM(model, tokenizer), tasks=["hellaswag"])

What is asked, tokenized, truncated and scored is what the harness's own backend for transformers,
`HFLM`, does with the same weights, so the scores are comparable. Nothing imports this file but
those who want it, for the harness is a large library.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eqx_gpt.chat import ChatTemplate
from eqx_gpt.config import did_you_mean
from eqx_gpt.generate import pad_prompts, rounded_up, stream
from eqx_gpt.gpt import GPT, check_tokens
from eqx_gpt.score import TokenScores, token_scores
from eqx_gpt.text import end_ids
from eqx_gpt.tokenizer import JSONTokenizer, Tokenizer, fingerprint
from eqx_gpt.tree import count_params

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"eqx_gpt.harness needs lm-evaluation-harness ({error}): pip install 'eqx-gpt[lm-eval]'"
    ) from error

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts, for the harness's cache of answers; the tokens of the context; those to score."""

# What a setting of transformers is where it does nothing: tasks give some of these.
_WITHOUT_EFFECT = {"num_beams": 1, "use_cache": True}
_SAMPLER = ("top_k", "top_p", "min_p", "repetition_penalty")
_REPORTED = ("results", "groups", "versions", "n-shot", "n-samples")


class HarnessLM(TemplateLM):
    """A model and its tokenizer, as the harness asks them.

    **Arguments:**

    - `batch_size`: rows computed at once.
    - `max_length`: the longest sequence that the model sees; None, and at most, its `block_size`.
      A longer one is cut on the left.
    - `max_gen_toks`: tokens to generate where a task does not say.
    - `prefix_token_id`: what stands before a text that has nothing before it. None: the
      tokenizer's token that begins a text, or else the one that ends it.
    - `add_bos_token`: whether every text begins with that token. None: as its `tokenizer.json`
      says, which is what transformers does.
    - `seed`: of tasks that sample.

    **Raises:** ValueError for sizes out of range.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        longest = model.config.block_size
        if max_length is not None and not 1 <= max_length <= longest:
            raise ValueError(f"max_length={max_length} is outside 1 to the model's {longest}")
        for name, value in (("batch_size", batch_size), ("max_gen_toks", max_gen_toks)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model = model
        self.tokenizer: Tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = longest if max_length is None else max_length
        self.max_gen_toks = max_gen_toks
        self.seed = seed
        special = {
            name: tokenizer.encode(text, special="token")
            for name, text in tokenizer.special_tokens.items()
        }
        bos = special.get("bos_token", [])
        self._prefix = prefix_token_id
        if self._prefix is None:
            self._prefix = bos[0] if bos else tokenizer.end_of_text
        if add_bos_token is None:
            self._before = list(tokenizer.prefix)
        else:
            self._before = [self.prefix_token_id] if add_bos_token else []
        self._unsaid = _special_ids(tokenizer) | {i for ids in special.values() for i in ids}
        self._stop = end_ids(tokenizer, model.config)

    @property
    def eot_token_id(self) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is None:
            raise ValueError(
                "this tokenizer has no token that begins or ends a text, and a text with nothing "
                "before it needs one; give prefix_token_id, such as that of a line break"
            )
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return fingerprint(self.tokenizer)[:16]

    def get_model_info(self) -> dict[str, Any]:
        return {
            "model_num_parameters": count_params(self.model),
            "model_dtype": str(self.model.wte.weight.dtype),
            "max_length": self.max_length,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Special tokens in the text are those tokens. What the tokenizer puts before a text is
        there too, unless the text has it already or `add_special_tokens` is False."""
        ids = self.tokenizer.encode(string, special="token")
        if add_special_tokens is None and self._prefix is not None and ids[:1] == [self._prefix]:
            return ids
        return ids if add_special_tokens is False else self._before + ids

    def tok_decode(self, tokens: Iterable[int]) -> str:
        """Without special tokens, and without ids that the tokenizer does not know."""
        known = range(self.tokenizer.vocab_size)
        return self.tokenizer.decode(i for i in tokens if i in known and i not in self._unsaid)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Without a generation prompt the last message stays open, to be continued."""
        text = ChatTemplate.of(self.tokenizer).render(
            chat_history, add_generation_prompt=add_generation_prompt
        )
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start = text.rindex(last.strip())
        said = last if text.startswith(last, start) else last.strip()
        return text[: start + len(said)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts: windows of `max_length`, in which each token counts once."""
        windows: list[TokenRequest] = []
        ends = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        found = [logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = [sum(found[a:b], 0.0) for a, b in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Those that differ in their last token alone, as answers of one letter do, are one row."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, tokens) in enumerate(requests):
            if not 1 <= len(tokens) <= self.max_length:
                raise ValueError(
                    f"a text to score has {len(tokens)} tokens, expected 1 to max_length="
                    f"{self.max_length}: {requests[i][0]!r:.80}"
                )
            context = context or [self.prefix_token_id]
            seen = (context + tokens)[-(self.max_length + 1) : -1]
            rows.setdefault(tuple(seen), []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        longest_first = sorted(rows.items(), key=lambda row: -len(row[0]))
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in _chunks(longest_first, self.batch_size):
                most = max(len(requests[i][2]) for _, members in batch for i in members)
                scores, following = self._scores([seen for seen, _ in batch], most - 1)
                for row, (_, members) in enumerate(batch):
                    for i in members:
                        texts, _, tokens = requests[i]
                        answers[i] = _answer(scores, following, row, tokens)
                        if texts is not None:
                            self.cache_hook.add_partial("loglikelihood", texts, answers[i])
                    bar.update(len(members))
        return answers

    def _scores(
        self, sequences: Sequence[Sequence[int]], n_scored: int
    ) -> tuple[TokenScores, np.ndarray]:
        """As arrays of NumPy: of the last `n_scored` tokens of each sequence, or of some more;
        and the log-probabilities of what follows it."""
        rows = min(_power_of_two(len(sequences)), self.batch_size)
        width = min(rounded_up(max(map(len, sequences))), self.max_length)
        tokens = np.zeros((rows, width), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence
            lengths[row] = len(sequence)
        inputs = check_tokens(tokens, self.model.config)
        n_scored = min(_power_of_two(n_scored), width)
        return jax.tree.map(np.asarray, _score(self.model, inputs, jnp.asarray(lengths), n_scored))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that end before the first of `until`, or at the token that ends a text."""
        asked: list[Any] = [request.args for request in requests]
        alike: dict[str, list[int]] = {}
        for i, (_, settings) in enumerate(asked):
            alike.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
        prompts = [self.tok_encode(text) for text, _ in asked]
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for same in alike.values():
                longest_first = sorted(same, key=lambda i: -len(prompts[i]))
                for batch in _chunks(longest_first, self.batch_size):
                    settings = asked[batch[0]][1]
                    texts = self._generate([prompts[i] for i in batch], settings, batch[0])
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", asked[i], text)
                    bar.update(len(batch))
        return answers

    def _generate(
        self, prompts: Sequence[list[int]], settings: Mapping[str, Any], seed: int
    ) -> list[str]:
        """Answers to prompts with the same settings."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        end = self.eot_token_id
        end_text = None if end is None else self.tokenizer.decode([end])
        until = [term for term in handle_stop_sequences(kwargs.pop("until"), end_text) if term]
        n_new = kwargs.pop("max_gen_toks")
        sampler = _sampler(kwargs)
        room = self.max_length - n_new
        if room < 1:
            raise ValueError(
                f"max_gen_toks={n_new} leaves no room for a prompt in max_length="
                f"{self.max_length}; ask for fewer, as in --gen_kwargs max_gen_toks="
                f"{self.max_length // 2}"
            )
        prompts = [(prompt or [self.prefix_token_id])[-room:] for prompt in prompts]
        rows = min(_power_of_two(len(prompts)), self.batch_size)
        padded = [*prompts, *prompts[:1] * (rows - len(prompts))]
        tokens, lengths = pad_prompts(padded)
        # A special token in `until` is no text that could be found later.
        named = [self.tokenizer.encode(term, special="token") for term in until]
        stop = [*self._stop, *(ids[0] for ids in named if len(ids) == 1 and ids[0] in self._unsaid)]
        stop = [i for i in stop if i < self.model.config.vocab_size]
        answers: list[list[int]] = [[] for _ in prompts]
        for chunk in stream(
            self.model,
            tokens,
            n_new,
            lengths=lengths,
            key=jax.random.fold_in(jax.random.key(self.seed), seed),
            stop=stop,
            **sampler,
        ):
            for answer, new in zip(answers, chunk.tolist(), strict=False):
                answer += new
            if all(self._ended(answer, stop, until) for answer in answers):
                break
        texts = [self.tok_decode(_before_any(answer, stop)) for answer in answers]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _ended(self, answer: list[int], stop: Iterable[int], until: Iterable[str]) -> bool:
        if any(i in answer for i in stop):
            return True
        text = self.tok_decode(answer)
        return any(term in text for term in until)


def evaluate(
    load: Callable[[], HarnessLM],
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], str]:
    """Scores the model that `load` gives on `tasks`: names of tasks, groups or tags.

    The tasks are looked up before the model is loaded. `include_path` is a directory of more of
    them, in YAML; `settings` are those of `lm_eval.simple_evaluate`.

    **Returns:** what the harness found, as JSON can hold it (`results`, `groups`, `versions`,
    `n-shot`, `n-samples`, with NaN as None), and its table.

    **Raises:** ValueError for a directory or a task that is not there; what the harness raises for
    tasks that are malformed.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={include_path!r} is no directory of tasks")
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ValueError(f"unknown task {name!r}; {did_you_mean(name, manager.all_tasks)}")
    run: Any = simple_evaluate  # its decorator hides its signature
    found = run(load(), tasks=list(tasks), task_manager=manager, log_samples=False, **settings)
    kept = {key: found[key] for key in _REPORTED if key in found}
    table = make_table(found)
    if "groups" in found:
        table += "\n" + make_table(found, "groups")
    return json.loads(json.dumps(kept, default=str), parse_constant=lambda _: None), table


@eqx.filter_jit
def _score(
    model: GPT, tokens: Int[Array, "rows width"], lengths: Int[Array, " rows"], n_scored: int
) -> tuple[TokenScores, Float[Array, "rows vocab"]]:
    """Of the last `n_scored` of a row's `lengths` tokens: right-aligned, with anything in the
    place of those that it does not have. And the log-probabilities of what follows them."""
    hidden, _ = model.hidden(tokens)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    following = jax.nn.log_softmax(model.unembed(last))
    if n_scored == 0:
        none = jnp.zeros((tokens.shape[0], 0))
        return TokenScores(none, none.astype(jnp.int32)), following
    at = lengths[:, None] - n_scored + jnp.arange(n_scored)[None, :]
    at = jnp.maximum(at, 1)
    before = jnp.take_along_axis(hidden, (at - 1)[..., None], axis=1)
    return token_scores(model, before, jnp.take_along_axis(tokens, at, axis=1)), following


def _answer(
    scores: TokenScores, following: np.ndarray, row: int, tokens: Sequence[int]
) -> tuple[float, bool]:
    """The log-probability of `tokens`, and whether each is the likeliest in its place."""
    *inner, last = tokens
    first = scores.logprob.shape[1] - len(inner)
    logprob = np.sum(scores.logprob[row, first:], dtype=np.float64) + following[row, last]
    greedy = scores.likeliest[row, first:].tolist() == inner and following[row].argmax() == last
    return float(logprob), bool(greedy)


def _sampler(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The sampler's arguments. ValueError for a setting that we do not have."""
    sampled = kwargs.pop("do_sample", False)
    temperature = kwargs.pop("temperature", 1.0)
    found = {name: kwargs.pop(name, None) for name in _SAMPLER}
    other = {k: v for k, v in kwargs.items() if k not in _WITHOUT_EFFECT or v != _WITHOUT_EFFECT[k]}
    if other:
        raise ValueError(
            f"generation_kwargs {other} are not known here; expected until, max_gen_toks, "
            f"do_sample, temperature, {', '.join(_SAMPLER)}"
        )
    return {**found, "top_k": found["top_k"] or None, "temperature": temperature if sampled else 0}


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    """The tokens that are no text."""
    ids = set() if tokenizer.end_of_text is None else {tokenizer.end_of_text}
    if isinstance(tokenizer, JSONTokenizer):
        added = json.loads(tokenizer.tokenizer_json).get("added_tokens") or []
        ids |= {token["id"] for token in added if token.get("special")}
    return ids


def _before_any(tokens: Sequence[int], stop: Sequence[int]) -> Sequence[int]:
    """As far as the first of `stop`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stop), len(tokens))]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _power_of_two(n: int) -> int:
    """The least that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0
