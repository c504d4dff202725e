"""The three ways of `scripts/sample.py`: samples of one prompt, a prompt a line, a conversation."""

import sys

from eqx_gpt.chat import ChatTemplate
from eqx_gpt.text import end_ids, prompt_ids
from scripts.sampling.speaker import Speaker


def samples(speaker: Speaker, prompt: str) -> None:
    """As many as are asked for, each after the prompt."""
    options = speaker.options
    ids, ends = (
        prompt_ids(speaker.tokenizer, prompt),
        end_ids(speaker.tokenizer, speaker.model.config),
    )
    left, first = options.num_samples, True
    while left:
        n = min(left, options.batch_size or left)
        if n == 1:
            _rule(first)
            speaker.say([ids], ends, after=prompt)
            print(flush=True)
        else:
            for text in speaker.say([ids] * n, ends):
                _rule(first)
                print(prompt + text, flush=True)
                first = False
        left, first = left - n, False


def interactive(speaker: Speaker) -> None:
    """Each line of standard input, continued."""
    ends = end_ids(speaker.tokenizer, speaker.model.config)
    while (line := _next_line()) is not None:
        if line:
            ids = prompt_ids(speaker.tokenizer, line)
            speaker.say([ids], ends, after=line)
            print(flush=True)


def chat(speaker: Speaker, name: str) -> None:
    """Each line of standard input, answered.

    For every answer the model reads the whole conversation anew, as its template renders it. Where
    that and an answer do not fit into the model's context, the oldest exchange is left out.
    """
    options = speaker.options
    template = ChatTemplate.of(speaker.tokenizer, name)
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    turns: list[dict[str, str]] = []
    while (line := _next_line()) is not None:
        if not line:
            continue
        turns.append({"role": "user", "content": line})
        while True:
            text = template.render([*system, *turns], add_generation_prompt=True)
            ids = speaker.tokenizer.encode(text, special="token")
            if len(ids) + options.max_new_tokens <= speaker.model.config.block_size:
                break
            if len(turns) < 3:
                break
            print(
                "(the oldest question and answer no longer fit and are left out)", file=sys.stderr
            )
            turns = turns[2:]
        (answer,) = speaker.say([ids], template.stop_ids)
        print(flush=True)
        turns.append({"role": "assistant", "content": answer})


def _rule(first: bool) -> None:
    if not first:
        print("---------------", file=sys.stderr, flush=True)


def _next_line() -> str | None:
    """Without the end of the line; None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input()
    except EOFError:
        print(file=sys.stderr)
        return None
