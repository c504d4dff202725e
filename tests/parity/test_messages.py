"""Which tokens of a conversation are answers, against transformers."""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from chat_templates import CONVERSATIONS, SPECIAL_TOKENS, TEMPLATES, messages_of, tokenizer_json

from eqx_gpt.tokenizer import JSONTokenizer
from train.datasets import prepare
from train.manifest import BEGINS, LEARNT

ANSWERED = [turns for turns in CONVERSATIONS if any(role == "assistant" for role, _ in turns)]


@pytest.fixture(scope="module")
def marked() -> transformers.PreTrainedTokenizerFast:
    """Its offsets keep white space: transformers finds no token at an answer's first blank else."""
    backend = tokenizers.Tokenizer.from_str(tokenizer_json())
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)
    hf.chat_template = TEMPLATES["marked"]
    return hf


@pytest.mark.parametrize("manner", ["marked", "unmarked"])
def test_answers_are_those_of_transformers(
    manner: str, marked: transformers.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With the template's own marks, and with none, where the answers are found by prompts."""
    source = TEMPLATES["marked"]
    if manner == "unmarked":
        source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    path = tmp_path / "a.jsonl"
    conversations = [messages_of(turns) for turns in ANSWERED] * 5
    conversations = [
        [*messages, {"role": "user", "content": f"the {i}"}]
        for i, messages in enumerate(conversations)
    ]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations))
    ours = JSONTokenizer(tokenizer_json(), "</s>", SPECIAL_TOKENS, chat_template=source)
    data = prepare("messages", tmp_path, name="m", files=[path], tokenizer=ours, val_fraction=0.4)

    found = []
    for split in ("train", "val"):
        tokens, flags = data.tokens(split).tolist(), data.flags(split)
        assert flags is not None
        begins = [i for i, flag in enumerate(flags) if flag & BEGINS]
        assert begins[0] == 0
        for start, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            answers = ((flags[start:end] & LEARNT) > 0).astype(int).tolist()
            found.append((tokens[start:end], answers))
    expected = [
        marked.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for messages in conversations
    ]
    pairs = [(x["input_ids"], list(x["assistant_masks"])) for x in expected]
    assert sorted(found) == sorted(pairs)
    assert len(found) == len(conversations)
    assert 0.1 < sum(sum(mask) for _, mask in found) / sum(len(mask) for _, mask in found) < 0.8
