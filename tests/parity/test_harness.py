"""lm-evaluation-harness: our adapter against its own backend for transformers, same weights."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from oracle import random_model
from tiny_run import TEXT, command, run
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from eqx_gpt.harness import HarnessLM, evaluate
from eqx_gpt.tokenizer import CharTokenizer
from weights import from_pretrained, load_tokenizer

SPECIAL = ["<s>", "</s>", "<pad>", "<|sep|>"]
SAID = 1.4  # so much more the models favour `</s>` and `<|sep|>`, or they would never say them
TEMPLATE = """{{ bos_token }}{% for m in messages %}<|sep|>{{ m.role }}: {{ m.content | trim }}
{% endfor %}{% if add_generation_prompt %}<|sep|>assistant:{% endif %}"""
CONFIGS = {
    "gpt2": {"n_layer": 2, "n_head": 3, "n_embd": 21, "n_positions": 53},
    "llama": {
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "hidden_size": 30, "head_dim": 10, "intermediate_size": 37, "max_position_embeddings": 59,
    },
}  # fmt: skip


def tokenizer_of(kind: str) -> Any:
    """Byte-level BPE, of llama with `<s>` before every text."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 67, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    bpe.train_from_iterator([TEXT, "Question: Answer:"], trainer)
    if kind == "llama":
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<|sep|>"], chat_template=TEMPLATE,
    )  # fmt: skip


class Pair:
    """The same weights twice."""

    def __init__(self, kind: str, directory: Path) -> None:
        tokenizer = tokenizer_of(kind)
        config = transformers.AutoConfig.for_model(
            kind, **CONFIGS[kind], vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1,
            pad_token_id=2,
        )  # fmt: skip
        hf = random_model(config)
        with torch.no_grad():
            hf.get_output_embeddings().weight[[1, 3]] *= SAID
        hf.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        # With its cache of logits, requests that differ in where they are cut get wrong numbers.
        self.theirs = HFLM(
            pretrained=hf, tokenizer=tokenizer, batch_size=3, device="cpu", logits_cache=False
        )
        self.directory = directory
        self.ours = HarnessLM(from_pretrained(directory), load_tokenizer(directory), batch_size=4)

    def ask(self, kind: str, *arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        """Both answers to each request."""

        def answers(lm: Any) -> Any:
            requests = [
                Instance(request_type=kind, doc={}, arguments=x, idx=i)  # pyright: ignore[reportArgumentType]
                for i, x in enumerate(arguments)
            ]
            return getattr(lm, kind)(requests, disable_tqdm=True)

        return answers(self.ours), answers(self.theirs)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    quick_compilation: None,
) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(TEXT.split(), k=n))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Three tasks in files: a choice with examples in the prompt, texts, and questions."""
    place, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def write(name: str, docs: list[dict[str, Any]], **task: Any) -> None:
        file = place / f"{name}.jsonl"
        file.write_text("".join(json.dumps(doc) + "\n" for doc in docs), "utf-8")
        task |= {
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {
                "data_files": {"test": str(file)}, "cache_dir": str(place / "cache"),
            },
        }  # fmt: skip
        (place / f"{name}.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML

    def doc(n: int) -> dict[str, Any]:
        choices = [words(rng, rng.randrange(1, 4)) for _ in range(3)]
        return {"text": words(rng, n), "choices": choices, "gold": rng.randrange(3)}

    write(
        "choice", [doc(rng.randrange(1, 25)) for _ in range(11)],
        output_type="multiple_choice", doc_to_text="Question: {{text}}\nAnswer:",
        doc_to_choice="choices", doc_to_target="gold", fewshot_split="test",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    write(
        "texts", [doc(n) for n in (1, 7, 61, 150)],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
        metric_list=[{"metric": m} for m in ("word_perplexity", "bits_per_byte")],
    )  # fmt: skip
    write(
        "questions", [doc(rng.randrange(1, 25)) for _ in range(7)],
        output_type="generate_until", doc_to_text="Question: {{text}}\nAnswer:",
        doc_to_target="{{choices[0]}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["\n", "c"], "max_gen_toks": 19, "do_sample": False},
    )  # fmt: skip
    return TaskManager(include_path=str(place), include_defaults=False)


@pytest.mark.filterwarnings("default")  # of libraries that the harness uses
def test_tasks(pair: Pair, tasks: TaskManager) -> None:
    def run(lm: Any) -> Any:
        return simple_evaluate(
            lm, tasks=["choice", "texts", "questions"], task_manager=tasks, num_fewshot=1,
            bootstrap_iters=0,
        )  # fmt: skip

    ours, theirs = run(pair.ours), run(pair.theirs)
    worst = 0.0
    for task, samples in theirs["samples"].items():
        assert len(samples) == {"choice": 11, "texts": 4, "questions": 7}[task]
        for found, expected in zip(ours["samples"][task], samples, strict=True):
            assert found["arguments"] == expected["arguments"]
            if task == "questions":
                assert found["resps"] == expected["resps"]
                continue
            a, b = (np.array(x["resps"], np.float64) for x in (found, expected))
            worst = max(worst, float(np.abs(a - b).max()))
        for metric, score in theirs["results"][task].items():
            if isinstance(score, float):
                assert ours["results"][task][metric] == pytest.approx(score, rel=1e-5), metric
            else:
                assert ours["results"][task][metric] == score
    print(f"loglikelihoods through lm-eval: {worst:.1e}")
    assert worst <= 1e-3


def test_loglikelihood(pair: Pair) -> None:
    """Contexts that are empty, too long, or that end with a space; a letter as the answer."""
    rng = random.Random(1)
    long = words(rng, 150)
    ours, theirs = pair.ask(
        "loglikelihood",
        ("", "Jack and Jill"),
        ("", "<s>Jack"),
        ("Jack", " and Jill"),
        ("Jack ", "and Jill"),
        ("<s>Jack", " and Jill"),
        ("Jack<|sep|>", "and </s>Jill"),
        *[("Jack and Jill", f" {letter}") for letter in "ABCA"],
        ("Jack and", " Jill A"),  # differs from those before in where it is cut
        (long, " of water"),
        (long, words(rng, 12)),
        ("Emma", " " + words(rng, 13)),
        ("é漢字😀", " \n\n\t"),
    )  # fmt: skip
    for (found, greedy), (expected, their_greedy) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == their_greedy


def test_greedy_is_told(pair: Pair) -> None:
    """Of the answer that a model gives itself, and of one that differs in its last token."""
    hf, tokenizer = pair.theirs.model, pair.theirs.tokenizer
    prompts = ["Jack and", "Emma went up the", "pails"]
    requests, expected = [], []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            for n in (1, 4):
                out = hf.generate(ids, do_sample=False, max_new_tokens=n, eos_token_id=None,
                                  attention_mask=torch.ones_like(ids))  # fmt: skip
                answer = out[0, ids.shape[1] :].tolist()
                other = [*answer[:-1], (answer[-1] + 1) % len(tokenizer)]
                context = ids[0].tolist()
                requests += [(("", ""), context, answer), (("", ""), context, other)]
                expected += [True, False]
    found = [greedy for _, greedy in pair.ours._loglikelihood_tokens(requests, True)]
    assert found == expected


def test_rolling(pair: Pair) -> None:
    rng = random.Random(2)
    texts = ["Jack", "<s>Jack", *(words(rng, n) for n in (5, 40, 99, 200))]
    ours, theirs = pair.ask("loglikelihood_rolling", *[(text,) for text in texts])
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_generation(pair: Pair) -> None:
    """Several settings at once; prompts that are too long; what ends a text and what does not."""
    rng = random.Random(3)
    prompts = [words(rng, n) for n in (1, 4, 90)] + ["Anna</s>", "<|sep|>é"]
    settings = [
        {"until": ["c", "nn", "u"], "max_gen_toks": 23, "num_beams": 1},
        {"until": "V", "max_new_tokens": 17, "do_sample": True, "temperature": 0.7, "top_k": 1},
    ]
    asked = [(prompt, dict(kwargs)) for prompt in prompts for kwargs in settings]
    ours, theirs = pair.ask("generate_until", *asked)
    assert ours == theirs
    assert len({len(text) for text in theirs}) > 4  # so that something ended them


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_special_tokens_in_answers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them ends a text, another where `until` has it; otherwise it is left out.

    One prompt at a time: theirs loses the token in a text that others of a batch prolong.
    """
    monkeypatch.setattr(pair.theirs, "batch_size_per_gpu", 1)
    rng = random.Random(4)
    prompts = ["<s>Jack", *(words(rng, n) for n in range(1, 7))]
    said = []
    for until in ([], ["<|sep|>"]):
        kwargs = {"until": until, "max_gen_toks": 17}
        ours, theirs = pair.ask("generate_until", *[(prompt, kwargs) for prompt in prompts])
        assert ours == theirs
        said.append(ours)
    assert said[0] != said[1]
    assert min(map(len, said[0])) < 5  # so that `</s>` ended one


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_chat_template(pair: Pair) -> None:
    """Also where the last message is to be continued."""
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Jack? "},
        {"role": "assistant", "content": "Jack and "},
    ]
    assert pair.ours.chat_template(True) == pair.theirs.chat_template(True) == TEMPLATE
    for history in (turns[:2], turns):
        for prompted in (True, False):
            found, expected = (
                lm.apply_chat_template(list(history), add_generation_prompt=prompted)
                for lm in (pair.ours, pair.theirs)
            )
            assert found == expected
            assert pair.ours.tok_encode(found) == pair.theirs.tok_encode(expected)


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_command(pair: Pair, tasks: TaskManager, tmp_path: Path) -> None:
    """The scores of `HarnessLM`, as JSON; then what a person may get wrong."""
    place = tasks.include_path
    flags = {"init_from": pair.directory, "include_path": place, "limit": 5}
    result = run(command("lm_eval.py", tasks="choice,texts", **flags), tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    expected = simple_evaluate(
        pair.ours, tasks=["choice", "texts"], task_manager=tasks, limit=5, bootstrap_iters=0
    )
    assert expected is not None
    for task in ("choice", "texts"):
        for metric, score in expected["results"][task].items():
            if isinstance(score, float) and "stderr" not in metric:
                assert found["results"][task][metric] == pytest.approx(score, rel=1e-6)
    assert found["n-samples"]["choice"] == {"original": 11, "effective": 5}
    assert "|acc_norm" in result.stderr
    flags["gen_kwargs"] = "max_gen_toks=53"
    result = run(command("lm_eval.py", tasks="questions", **flags), tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("lm_eval: max_gen_toks=53 leaves no room for a prompt in max_length=53")


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_mistakes(pair: Pair, tasks: TaskManager) -> None:
    def load() -> HarnessLM:
        raise AssertionError("tasks are looked up before the model is loaded")

    with pytest.raises(ValueError, match="'none' is no directory of tasks"):
        evaluate(load, ["choice"], include_path="none")
    with pytest.raises(ValueError, match="unknown task 'choise'; did you mean 'choice'"):
        evaluate(load, ["choise"], include_path=str(tasks.include_path))
    model, tokenizer = pair.ours.model, pair.ours.tokenizer
    with pytest.raises(ValueError, match="max_length=54 is outside 1 to the model's 53"):
        HarnessLM(model, tokenizer, max_length=54)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        HarnessLM(model, tokenizer, batch_size=0)
    characters = HarnessLM(model, CharTokenizer.from_text(TEXT))
    with pytest.raises(ValueError, match="no token that begins or ends a text"):
        characters.loglikelihood([Instance("loglikelihood", {}, ("", "Jack"), 0)], True)
    asked = Instance("generate_until", {}, ("Jack", {"penalty_alpha": 0.6}), 0)
    with pytest.raises(ValueError, match=r"\{'penalty_alpha': 0.6\} are not known here"):
        pair.ours.generate_until([asked], True)
    asked = Instance("loglikelihood", {}, ("Jack", " and" * 99), 0)
    with pytest.raises(ValueError, match="has 99 tokens, expected 1 to max_length=53"):
        pair.ours.loglikelihood([asked], True)
