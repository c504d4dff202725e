"""A model that speaks: ids in, text to stdout."""

import json
from collections.abc import Sequence

import jax

import eqx_gpt
from eqx_gpt import GPT, Draft
from eqx_gpt.inference import lay_out
from eqx_gpt.text import Piece, stream_texts, with_tokens_of
from eqx_gpt.tokenizer import Tokenizer, same_tokens
from scripts.sampling.arguments import Arguments
from weights import from_pretrained, load_tokenizer


class Speaker:
    """A model laid out for decoding, its tokenizer, and how it is asked to draw."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, options: Arguments) -> None:
        """ValueError if the draft that is asked for has other tokens."""
        self.tokenizer, self.options = tokenizer, options
        self.model = self._prepared(model)
        self.draft = None if options.draft is None else self._drafting(options.draft)
        self._n_drawn = 0
        if options.logprobs is not None:
            options.logprobs.write_text("", encoding="utf-8")  # a wrong path is said at once

    def _prepared(self, model: GPT) -> GPT:
        model = with_tokens_of(model, self.tokenizer)
        if self.options.quantize == "none":
            return lay_out(model)
        return eqx_gpt.for_inference(model, "int8" if self.options.quantize == "int8" else None)

    def _drafting(self, name: str) -> Draft:
        if not same_tokens(load_tokenizer(name), self.tokenizer):
            raise ValueError(
                f"--draft {name} has another tokenizer than the model; take a smaller model of "
                "the same family"
            )
        return Draft(self._prepared(from_pretrained(name)), self.options.n_draft)

    def say(
        self, prompts: Sequence[Sequence[int]], ends: Sequence[int], after: str = ""
    ) -> list[str]:
        """The continuation of each prompt. Of a single one, each piece is printed as it is made,
        after the text `after`. ValueError for a setting outside its range, and nothing printed."""
        options = self.options
        pieces = stream_texts(
            self.model,
            self.tokenizer,
            prompts,
            options.max_new_tokens,
            ends=ends,
            stop_strings=options.stop,
            chunk=4 if len(prompts) == 1 else 32,
            key=jax.random.fold_in(jax.random.key(options.seed), self._n_drawn),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            draft=self.draft,
            logprobs=options.logprobs is not None,
        )
        self._n_drawn += 1
        if len(prompts) == 1:
            print(after, end="", flush=True)
        rows: list[list[Piece]] = [[] for _ in prompts]
        for new in pieces:
            for row, piece in zip(rows, new, strict=True):
                row.append(piece)
            if len(prompts) == 1:
                print(new[0].text, end="", flush=True)
        texts = ["".join(piece.text for piece in row) for row in rows]
        if options.logprobs is not None:
            with options.logprobs.open("a", encoding="utf-8") as file:
                for text, row in zip(texts, rows, strict=True):
                    tokens = [token for piece in row for token in piece.tokens]
                    logprobs = [value for piece in row for value in piece.logprobs]
                    found = {"text": text, "tokens": tokens, "logprobs": logprobs}
                    file.write(json.dumps(found) + "\n")
        return texts
