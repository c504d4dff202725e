"""Conversations as text: the Jinja template that a model was taught its turns with.

A template is code that came with somebody's weights. It runs in jinja2's immutable sandbox, with
the filters and functions that transformers gives it, so that both make the same text of it.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eqx_gpt.tokenizer import JSONTokenizer, Tokenizer

Message = Mapping[str, Any]
"""`role` ("system", "user", "assistant", ...) and `content`; plain JSON."""

Span = tuple[int, int]
"""First character, and the one after the last."""

# No characters (Unicode 23.7): between them stands what a template says the model generates.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatError(ValueError):
    """A conversation that cannot be rendered, or a model without a template."""


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations become text. `ChatTemplate.of(tokenizer)` makes it.

    - `special_tokens`: what the template may name, such as `bos_token`.
    - `stop_ids`: the tokens that end an answer, the template's own first.
    - `end_of_turn`: the text of the token that the template puts after an answer, if there is one.

    Encode what `render` returns with `tokenizer.encode(text, special="token")`: it has all its
    special tokens in it.
    """

    source: str = field(repr=False)
    special_tokens: Mapping[str, str]
    stop_ids: tuple[int, ...] = ()
    end_of_turn: str | None = None

    @staticmethod
    def of(tokenizer: Tokenizer, name: str = "this model") -> "ChatTemplate":
        """The template that came with the tokenizer. ChatError if it has none; `name` is whose."""
        if tokenizer.chat_template is None or not isinstance(tokenizer, JSONTokenizer):
            raise ChatError(
                f"{name} has no chat template, so it was not taught to chat: expected "
                "chat_template in tokenizer_config.json, a file chat_template.jinja, or "
                "tokenizer.chat_template in a GGUF file; take a model tuned on conversations "
                "(often called ...-Instruct), or put a chat_template.jinja beside its tokenizer"
            )
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        end = _end_of_turn(template, tokenizer)
        ends = [tokenizer.token_id(token) for token in (end, *tokenizer.stop_tokens) if token]
        ids = [i for i in (*ends, tokenizer.end_of_text) if i is not None]
        return ChatTemplate(
            template.source, template.special_tokens, tuple(dict.fromkeys(ids)), end
        )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, special tokens among it.

        With `add_generation_prompt` it ends where the assistant's answer is to begin. ChatError if
        the template is malformed or refuses the conversation.
        """
        return self._render(messages, add_generation_prompt, mark=False)

    def render_answers(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of a whole conversation, and which parts of it the assistant says.

        If the template has `{% generation %}` blocks, those; else what an answer adds to the
        text that prompts for it, up to its end-of-turn token. ChatError as for `render`, and if an
        answer's place cannot be told because the template writes earlier turns anew later on.
        """
        if _GENERATION.search(self.source):
            return _unmarked(self._render(messages, False, mark=True))
        text = self.render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            prompt = self.render(messages[:i], add_generation_prompt=True)
            until = self.render(messages[: i + 1])
            start, end = len(prompt), len(until)
            if self.end_of_turn is not None:
                at = until.rfind(self.end_of_turn, start)
                end = end if at < 0 else at + len(self.end_of_turn)
            if start > end or text[:start] != prompt or text[:end] != until[:end]:
                raise ChatError(
                    f"message {i} is an answer whose place the chat template does not show: the "
                    "conversation up to it renders otherwise than the beginning of the whole; "
                    "end the conversation with this answer, or use a template with "
                    "{% generation %} ... {% endgeneration %} around the answers"
                )
            spans.append((start, end))
        return text, spans

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, *, mark: bool
    ) -> str:
        try:
            # Of plain JSON types alone, which have no methods that do anything.
            plain = json.loads(json.dumps(list(messages)))
        except (TypeError, ValueError) as error:
            raise ChatError(f"messages must be plain JSON: {error}") from None
        for i, message in enumerate(plain):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ChatError(
                    f"message {i} is {message!r:.80}, expected an object with role and content, as "
                    'in {"role": "user", "content": "Hello"}'
                )
        if mark and any(x in json.dumps(plain, ensure_ascii=False) for x in (_OPEN, _CLOSE)):
            raise ChatError("the conversation holds U+FDD0 or U+FDD1, no characters; remove them")
        template = _compiled(self.source, mark)
        try:
            return template.render(
                **self.special_tokens,
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program, which may fail in any way
            raise ChatError(f"the chat template refuses the conversation: {error}") from error


def _end_of_turn(template: ChatTemplate, tokenizer: JSONTokenizer) -> str | None:
    """The first special token after an answer, read off an example."""
    said = "eqx"
    try:
        text = template.render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        )
    except ChatError:
        return None
    for i in tokenizer.encode(text.rpartition(said)[2], special="token"):
        token = tokenizer.token_text(i) or ""
        if [tokenizer.encode(token, special=x) == [i] for x in ("token", "text")] == [True, False]:
            return token
    return None


def _unmarked(text: str) -> tuple[str, list[Span]]:
    parts, spans, length = [], [], 0
    for piece in text.split(_OPEN):
        said, closed, rest = piece.partition(_CLOSE)
        if closed:
            spans.append((length, length + len(said)))
        parts += [said, rest]
        length += len(said) + len(rest)
    return "".join(parts), [(start, end) for start, end in spans if start < end]


@functools.lru_cache(maxsize=16)
def _compiled(source: str, mark: bool) -> Any:
    import jinja2

    try:
        return _environment(mark).from_string(source)
    except jinja2.TemplateError as error:
        raise ChatError(f"the chat template is malformed: {error}") from error


@functools.cache
def _environment(mark: bool) -> Any:
    # Imported where used: `import eqx_gpt` stays fast.
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}`: what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("said")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def said(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}" if mark else caller()

    class Namespace(jinja2.utils.Namespace):
        """Without names that Python gives a meaning to: `__html__` would be called."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args  # so that a template may say namespace(self=1)
            names = dict(*rest, **kwargs)
            for name in names:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, names)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.TemplateError(f"a namespace may not hold the name {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Without the escapes for HTML of jinja2's own."""
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
        "namespace": Namespace,
    }
    return environment
