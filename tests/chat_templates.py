"""Chat templates in the manners that models have, and a tokenizer with the tokens they name."""

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ["<s>", "</s>", "<pad>", "<|start|>", "<|header|>", "<|end|>", "[INST]", "[/INST]"]
MERGES = [("a", "n"), ("Ċ", "Ċ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("e", "Ċ")]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TEMPLATES = {
    # A default system message, and nothing but concatenation.
    "chatml": """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
{{ '<|start|>system\nBe brief.<|end|>\n' }}{% endif %}
{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}""",
    # A date, trimmed contents, a loop variable, the bos token.
    "headers": """{{- bos_token }}{% set ns = namespace(n=0) %}
{%- if date is not defined %}{% set date = strftime_now('%Y') %}{% endif %}
<|start|>system<|header|>

Year {{ date }}.<|end|>
{%- for m in messages %}
    {%- set ns.n = ns.n + 1 %}
    {{- '<|start|>' + m['role'] + '<|header|>\n\n' + m['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|header|>\n\n' }}{%- endif %}""",
    # Turns must alternate; the prompt needs no prefix; an answer ends the text.
    "instruct": """{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    # No line controls but `break`, JSON of a message, and a macro.
    "json": """{% macro turn(m) %}
<|start|>{{ {'é': m.content, 'role': m.role} | tojson }}<|end|>{% endmacro %}
{% for m in messages %}{% if loop.index0 == 4 %}{% break %}{% endif %}{{ turn(m) }}{% endfor %}
{% if add_generation_prompt %}<|start|>{{ {'role': 'assistant'} | tojson(indent=2) }}{% endif %}
{% if tools %}never{% endif %}""",
    # As "chatml", with what the assistant says marked.
    "marked": """{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' -%}
{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{{ '\n' }}
{%- else -%}
{{ m.content + '<|end|>\n' }}
{%- endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}""",
}

USER, ASSISTANT = "user", "assistant"
CONVERSATIONS = [
    [(USER, "Hi")],
    [(USER, "Hi"), (ASSISTANT, "Hello")],
    [
        (USER, "\n 😀 the"),
        (ASSISTANT, "\n\nthe an\n 🇩🇪"),
        (USER, "<|end|>"),
        (ASSISTANT, "é <b>&"),
    ],
    [(USER, "a"), (ASSISTANT, ""), (USER, '"q"\\'), (ASSISTANT, "x</s>y"), (USER, "{{ x }}")],
]


def messages_of(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@functools.cache
def tokenizer_json() -> str:
    """Byte-level BPE with few merges, some of them across the edges of turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer.to_str()
