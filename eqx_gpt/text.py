"""Text in and text out of a model: prompts as ids, and new ids as text that is whole."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from eqx_gpt.config import GPTConfig
from eqx_gpt.generate import pad_prompts, stream, stream_with_logprobs
from eqx_gpt.gpt import GPT
from eqx_gpt.tokenizer import Tokenizer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 16  # tokens before the new ones that are decoded with them


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt, with what the model expects before a text (`Tokenizer.prefix`).

    Special tokens in the text count as such. ValueError if there is not one token.
    """
    ids, prefix = tokenizer.encode(text, special="token"), list(tokenizer.prefix)
    ids = ids if ids[: len(prefix)] == prefix else prefix + ids
    if not ids:
        raise ValueError("the prompt is empty; give it some text, such as '\\n'")
    return ids


def with_tokens_of(model: GPT, tokenizer: Tokenizer) -> GPT:
    """The model, of whose table only the rows with an id of the tokenizer can be drawn."""
    config = model.config
    if config.real_vocab_size <= tokenizer.vocab_size:
        return model
    return model.with_config(dataclasses.replace(config, n_token=tokenizer.vocab_size))


def end_ids(tokenizer: Tokenizer, config: GPTConfig) -> list[int]:
    """The tokens after which a text is over, of those that the model has."""
    ids = [tokenizer.encode(token, special="token") for token in tokenizer.stop_tokens]
    ends = [tokenizer.end_of_text, *(single[0] for single in ids if len(single) == 1)]
    return [i for i in dict.fromkeys(ends) if i is not None and i < config.vocab_size]


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 256,
    *,
    stop_strings: Sequence[str] = (),
    **settings: Any,
) -> list[str]:
    """How the model continues each prompt; drawn as one batch, whatever their lengths.

    **Arguments:**

    - `stop_strings`: a text ends before the first of them, and before a token that ends texts.
    - `settings`: those of `eqx_gpt.generate`: `key`, `temperature` and so on.

    **Returns:** the new text of each, without the prompt.

    **Raises:** ValueError as `eqx_gpt.generate` and the tokenizer, and for an empty prompt.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of texts, got one text; give [text]")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    ends = end_ids(tokenizer, model.config)
    pieces = stream_texts(
        model, tokenizer, ids, max_new_tokens, ends=ends, stop_strings=stop_strings, **settings
    )
    return ["".join(piece.text for piece in row) for row in zip(*pieces, strict=True)]


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 256,
    *,
    stop_strings: Sequence[str] = (),
    chunk: int = 4,
    **settings: Any,
) -> Iterator[str]:
    """The text of `complete` for one prompt, piece by piece while it is made, in whole characters.

    `chunk` is how many tokens are awaited for a piece.
    """
    ids, ends = prompt_ids(tokenizer, prompt), end_ids(tokenizer, model.config)
    pieces = stream_texts(
        model,
        tokenizer,
        [ids],
        max_new_tokens,
        ends=ends,
        stop_strings=stop_strings,
        chunk=chunk,
        **settings,
    )
    return (piece.text for (piece,) in pieces if piece.text)


class Piece(NamedTuple):
    """What is new in a row.

    - `text`: all of it together is the text.
    - `tokens`: those read for it, an end among them; of a stop string also the tokens it took.
    - `logprobs`: what the model gives each of these, in nats; none if they were not asked for.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]


def stream_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    ends: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    chunk: int = 32,
    logprobs: bool = False,
    **settings: Any,
) -> Iterator[list[Piece]]:
    """What is new in each row, again and again until all are over, of prompts given as ids."""
    rows = [TextStream(tokenizer, prompt, ends, stop_strings) for prompt in prompts]
    tokens, lengths = pad_prompts(prompts)
    settings |= {
        "lengths": None if (lengths == lengths[0]).all() else lengths,
        "stop": ends,
        "chunk": chunk,
    }
    # Begun here, so that what is wrong with the settings is said before the first piece is asked.
    if logprobs:
        chunks = stream_with_logprobs(model, tokens, max_new_tokens, **settings)
    else:
        plain = stream(model, tokens, max_new_tokens, **settings)
        chunks = ((new, new[:, :0]) for new in plain)

    def pieces() -> Iterator[list[Piece]]:
        for new, of_each in chunks:
            yield [
                row.read(ids, values)
                for row, ids, values in zip(rows, new.tolist(), of_each.tolist(), strict=True)
            ]
            if all(row.ended for row in rows):
                return
        yield [Piece(row.finish(), [], []) for row in rows]

    return pieces()


class TextStream:
    """The new tokens of one sequence as text, as soon as it is certain what the text is.

    Bytes of a character wait for the rest of it, and text that may begin a stop string waits until
    it does or does not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        ends: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> None:
        """ValueError for an empty stop string, before which every text would end."""
        if isinstance(stop_strings, str):
            raise TypeError("stop_strings must be a list of texts, got one text; give [text]")
        if "" in stop_strings:
            raise ValueError("a stop string is empty; give some text, such as '\\n'")
        self.ended = False
        """Whether a stop string or one of `ends` has come, or `finish`."""
        self._decode = tokenizer.decode
        self._ends, self._stops = frozenset(ends), tuple(stop_strings)
        # Some tokens spell otherwise at the beginning of a text.
        self._window = list(prompt)[-_CONTEXT:]
        self._n_given = len(self._decode(self._window))
        self._held = ""

    def read(self, ids: Sequence[int], logprobs: Sequence[float]) -> Piece:
        """`add`, with the tokens that it took. `logprobs` are theirs, or none."""
        if self.ended:
            return Piece("", [], [])
        end = next((n for n, i in enumerate(ids, 1) if i in self._ends), len(ids))
        return Piece(self.add(ids), list(ids[:end]), list(logprobs[:end]))

    def add(self, ids: Sequence[int]) -> str:
        """The text that has become certain by these tokens; what follows an end counts for none."""
        if self.ended:
            return ""
        for i in ids:
            if i in self._ends:
                return self.finish()
            self._window.append(i)
        text = self._decode(self._window)
        certain = len(text.rstrip(_UNKNOWN))
        if certain <= self._n_given:
            return ""
        new, self._n_given = text[self._n_given : certain], certain
        if certain == len(text):
            self._forget()
        return self._until_stop(self._held + new)

    def finish(self) -> str:
        """The rest, where there are no more tokens. Bytes that make no character are U+FFFD."""
        if self.ended:
            return ""
        rest = self._decode(self._window)[self._n_given :]
        text = self._until_stop(self._held + rest)
        if not self.ended:
            text, self.ended = text + self._held, True
        return text

    def _until_stop(self, text: str) -> str:
        """The part before a stop string, or before what may be the beginning of one."""
        found = [text.find(stop) for stop in self._stops if stop in text]
        if found:
            self.ended = True
            return text[: min(found)]
        lengths = [
            n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])
        ]
        n_held = max(lengths, default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def _forget(self) -> None:
        """Old tokens, so that decoding does not take longer and longer; not in mid-character."""
        if len(self._window) < 8 * _CONTEXT:
            return
        last = self._window[-_CONTEXT:]
        text = self._decode(last)
        if _UNKNOWN not in text:
            self._window, self._n_given = last, len(text)
