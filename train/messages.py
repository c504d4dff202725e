"""Conversations to learn from: JSONL of messages, rendered by the chat template of a model.

A line is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}`. The
model learns what the assistant says, with the token that ends it, and nothing else.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from eqx_gpt.chat import ChatError, ChatTemplate
from eqx_gpt.tokenizer import JSONTokenizer, TokenIds, Tokenizer
from train.corpora import Corpus, Document, held_out
from train.files import sha256_of
from train.manifest import DatasetError


def conversations(files: Sequence[Path], tokenizer: Tokenizer, val_fraction: float) -> Corpus:
    """The conversations in JSONL files, in their order.

    A hash of a conversation decides its split, so that no copy of one is in both. DatasetError
    that names the line, for one that is no conversation, before anything is written.
    """
    try:
        template = ChatTemplate.of(tokenizer, "--tokenizer")
    except ChatError as error:
        raise DatasetError(str(error)) from None
    for path in files:
        if not path.is_file():
            raise DatasetError(f"--files {path} is no file; give JSONL files of messages")
    hashes = [sha256_of(path) for path in files]
    n_line = sum(1 for _ in _lines(files))
    if not n_line:
        raise DatasetError(
            f"--files: no conversation in {', '.join(map(str, files))}; give files that have some"
        )

    def documents() -> Iterator[Document]:
        for where, line in _lines(files):
            messages = _messages(where, line)
            try:
                text, answers = template.render_answers(messages)
            except ChatError as error:
                raise DatasetError(f"{where}: {error}") from None
            split = "val" if held_out(text.encode("utf-8"), val_fraction) else "train"
            yield Document(split, text, tuple(answers))

    return Corpus(
        source={
            "files": len(files),
            "conversations": n_line,
            "sha256": hashlib.sha256("\n".join(hashes).encode("ascii")).hexdigest(),
            "val": f"sha256 of a conversation's text, {val_fraction:g} of the conversations",
        },
        tokenizer=tokenizer,
        separator="none",
        text_bytes=sum(path.stat().st_size for path in files),
        documents=documents,
        packed=True,
    )


def tokenize(
    tokenizer: JSONTokenizer, document: Document
) -> tuple[TokenIds, Bool[np.ndarray, "_"]]:
    """The ids of a document, and which of them hold a character of an answer.

    The text is tokenized as a whole, as transformers does: a token that begins before an answer
    and ends within it, where the tokenizer merges across that edge, is learnt.
    """
    ids, spans = tokenizer.encode_spans(document.text)
    first, after = spans[:, 0], np.maximum(spans[:, 1], spans[:, 0] + 1)
    learnt = np.zeros(len(ids), bool)
    for start, end in document.answers or ():
        learnt |= (first < end) & (after > start)
    return ids, learnt


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Every line with something in it, and where it is."""
    for path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", line


def _messages(where: str, line: bytes) -> list[dict[str, Any]]:
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise DatasetError(f"{where}: not JSON in UTF-8 ({error}); one object a line") from None
    messages = content.get("messages") if isinstance(content, dict) else None
    expected = 'expected {"messages": [{"role": "user", "content": "..."}, ...]}'
    if not isinstance(messages, list) or not messages:
        raise DatasetError(f"{where}: found {content!r:.80}, {expected}")
    for message in messages:
        role, said = (
            message.get(name) if isinstance(message, dict) else None for name in ("role", "content")
        )
        if not isinstance(role, str) or not isinstance(said, str):
            raise DatasetError(f"{where}: found the message {message!r:.80}, {expected}")
        if any("\ud800" <= character <= "\udfff" for character in said):
            raise DatasetError(f"{where}: half a surrogate pair in {said!r:.80}; repair the text")
    if all(message["role"] != "assistant" for message in messages):
        raise DatasetError(
            f"{where}: no message of the role 'assistant', so nothing to learn; leave the line out"
        )
    return messages
