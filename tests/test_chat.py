"""Chat templates: whose they are, where answers lie in the text, what is refused."""

import pytest
from chat_templates import CONVERSATIONS, SPECIAL_TOKENS, TEMPLATES, messages_of, tokenizer_json

from eqx_gpt.chat import ChatError, ChatTemplate
from eqx_gpt.tokenizer import GPT2Tokenizer, JSONTokenizer, tokenizer_from_spec


def tokenizer_with(source: str | None, **kwargs) -> JSONTokenizer:
    return JSONTokenizer(tokenizer_json(), "</s>", SPECIAL_TOKENS, chat_template=source, **kwargs)


@pytest.mark.parametrize(
    ("manner", "ends"),
    [
        ("chatml", ["<|end|>", "</s>"]),
        ("headers", ["<|end|>", "</s>"]),
        ("instruct", ["</s>"]),
        ("json", ["<|end|>", "</s>"]),
        ("marked", ["<|end|>", "</s>"]),
    ],
)
def test_what_ends_an_answer(manner, ends):
    tokenizer = tokenizer_with(TEMPLATES[manner])
    template = ChatTemplate.of(tokenizer_from_spec(tokenizer.spec()))
    assert [tokenizer.token_text(i) for i in template.stop_ids] == ends
    assert template.end_of_turn == ends[0]


def test_stop_tokens_of_the_model_end_answers_too():
    template = ChatTemplate.of(tokenizer_with("{{ messages[0].content }}", stop_tokens=("<pad>",)))
    ids = [tokenizer_with(None).token_id(token) for token in ("<pad>", "</s>")]
    assert list(template.stop_ids) == ids
    assert template.end_of_turn is None


@pytest.mark.parametrize(
    ("manner", "answers"),
    [
        ("chatml", ["\n\nthe an\n 🇩🇪<|end|>", "é <b>&<|end|>"]),
        ("headers", ["the an\n 🇩🇪<|end|>", "é <b>&<|end|>"]),
        ("instruct", [" the an\n 🇩🇪 </s>", " é <b>& </s>"]),
        ("marked", ["\n\nthe an\n 🇩🇪<|end|>", "é <b>&<|end|>"]),
    ],
)
def test_where_answers_lie(manner, answers):
    template = ChatTemplate.of(tokenizer_with(TEMPLATES[manner]))
    messages = messages_of(CONVERSATIONS[2])
    text, spans = template.render_answers(messages)
    assert text == template.render(messages)
    assert [text[start:end] for start, end in spans] == answers


def test_an_answer_that_is_rendered_anew_later_is_refused():
    source = """{% for m in messages %}<|start|>{{ m.role }}:
{%- if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant:{% endif %}"""
    template = ChatTemplate.of(tokenizer_with(source))
    turns = messages_of(CONVERSATIONS[2])
    text, spans = template.render_answers(turns[:2])
    assert [text[start:end] for start, end in spans] == [turns[1]["content"] + "<|end|>"]
    with pytest.raises(ChatError, match=r"message 1 is an answer whose place .* generation %}"):
        template.render_answers(turns)


def test_no_template():
    for tokenizer in (GPT2Tokenizer(), tokenizer_with(None)):
        with pytest.raises(ChatError, match=r"^gpt2 has no chat template.*-Instruct"):
            ChatTemplate.of(tokenizer, "gpt2")


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": 1}], r"message 0 is \{'role': 1\}, expected an object with role"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], r"message 1 is \{'content'"),
        ([{"role": "user", "content": object()}], "plain JSON"),
        ([{"role": "user"}], "refuses the conversation: "),
    ],
)
def test_malformed_messages(messages, error):
    with pytest.raises(ChatError, match=error):
        ChatTemplate.of(tokenizer_with(TEMPLATES["chatml"])).render(messages)


def test_characters_that_would_be_taken_for_marks():
    template = ChatTemplate.of(tokenizer_with(TEMPLATES["marked"]))
    with pytest.raises(ChatError, match=r"U\+FDD0"):
        template.render_answers(messages_of([("user", "\ufdd0")]))
