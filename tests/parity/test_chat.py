"""Conversations as text against transformers'."""

from typing import Any

import pytest
import tokenizers
import transformers
from chat_templates import CONVERSATIONS, SPECIAL_TOKENS, TEMPLATES, messages_of, tokenizer_json
from test_gguf import smollm2

from eqx_gpt.chat import ChatError, ChatTemplate
from eqx_gpt.tokenizer import JSONTokenizer
from weights import load_tokenizer


def both(source: str) -> tuple[ChatTemplate, Any]:
    end = SPECIAL_TOKENS["eos_token"]
    ours = JSONTokenizer(tokenizer_json(), end, SPECIAL_TOKENS, chat_template=source)
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json()), **SPECIAL_TOKENS
    )
    hf.chat_template = source
    return ChatTemplate.of(ours), hf


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("manner", TEMPLATES)
def test_rendered(manner: str, turns: list, add_generation_prompt: bool) -> None:
    template, hf = both(TEMPLATES[manner])
    messages = messages_of(turns)
    expected = hf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected


def test_rendered_by_a_real_template() -> None:
    path = smollm2()
    template = ChatTemplate.of(load_tokenizer(path))
    hf = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for turns in CONVERSATIONS:
        for system in ([], [{"role": "system", "content": "Be kind."}]):
            messages = system + messages_of(turns)
            for prompt in (False, True):
                expected = hf.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
                assert template.render(messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(__html__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages[9].content.x }}",
        "{% for %}",
    ],
)
def test_refused_by_both(source: str) -> None:
    template, hf = both(source)
    messages = messages_of(CONVERSATIONS[0])
    with pytest.raises(Exception):  # noqa: B017, PT011 of whichever kind
        hf.apply_chat_template(messages, tokenize=False)
    with pytest.raises(ChatError, match="chat template"):
        template.render(messages)
