"""Hugging Face transformers as a contender, for every task."""

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from scripts.benchmarks.job import Job
from scripts.benchmarks.serve import Prepared, timed
from scripts.benchmarks.torch_gpt import DEVICE, prepare_training


def prepare(job: Job, settings: dict[str, Any]) -> Prepared:
    """Settings: `precision`; of training also those of torch_gpt; of loading `touch`."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    task = {"train": _train, "prefill": _prefill, "decode": _decode, "load": _load}[job.task]
    return task(job, settings)


def _model(job: Job, dtype: torch.dtype) -> Any:
    if job.source is None:
        fields = {name: value for name, value in job.hf.items() if name != "model_type"}
        config = transformers.AutoConfig.for_model(job.hf["model_type"], **fields)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = _from_files(job.source, dtype)
    return model.to(DEVICE)


def _from_files(source: str, dtype: torch.dtype) -> Any:
    load = transformers.AutoModelForCausalLM.from_pretrained
    path = Path(source)
    if path.suffix == ".gguf":
        return load(path.parent, gguf_file=path.name, dtype=dtype)
    return load(source, dtype=dtype)


class _Loss(nn.Module):
    """The loss of transformers' model; it shifts the targets itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _train(job: Job, settings: dict[str, Any]) -> Prepared:
    model = _model(job, torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return prepare_training(_Loss(model.train()), job, settings)


def _inference(job: Job, settings: dict[str, Any]) -> tuple[Any, Tensor]:
    dtype = torch.float32 if settings["precision"] == "float32" else torch.bfloat16
    model = _model(job, dtype).eval()
    # Neither side may end early.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    vocab_size = model.config.vocab_size
    return model, torch.randint(vocab_size, (job.batch_size, job.seq), device=DEVICE)


def _facts(model: nn.Module) -> dict[str, Any]:
    n_params = sum(p.numel() for p in model.parameters())
    return {"params": n_params, "threads": torch.get_num_threads()}


def _prefill(job: Job, settings: dict[str, Any]) -> Prepared:
    model, prompt = _inference(job, settings)

    @torch.inference_mode()
    def run(n: int) -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(n):
            model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
        return time.perf_counter() - start, n * prompt.numel()

    return Prepared(run, _facts(model))


def _decode(job: Job, settings: dict[str, Any]) -> Prepared:
    """As ours: the time of one more token than `new_tokens`, less that of one."""
    model, prompt = _inference(job, settings)
    sampling: dict[str, Any] = {"do_sample": job.temperature > 0}
    if job.temperature > 0:
        sampling |= {"temperature": job.temperature, "top_k": job.top_k or 0, "top_p": 1.0}
    mask = torch.ones_like(prompt)

    def sample(n_new: int) -> None:
        new = model.generate(
            prompt, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, **sampling
        )
        assert new.shape[-1] == job.seq + n_new

    def run(n: int) -> tuple[float, float]:
        seconds = 0.0
        for _ in range(n):
            seconds -= timed(lambda: sample(1), 0)[0]
            seconds += timed(lambda: sample(job.new_tokens + 1), 0)[0]
        return seconds, n * job.batch_size * job.new_tokens

    return Prepared(run, _facts(model))


def _load(job: Job, settings: dict[str, Any]) -> Prepared:
    """`touch` reads every number once: without it they may still lie on disk, mapped."""
    assert job.source is not None
    source = job.source
    facts = _facts(_from_files(source, torch.float32))

    def run(n: int) -> tuple[float, float]:
        def work() -> None:
            for _ in range(n):
                model = _from_files(source, torch.float32)
                if settings["touch"]:
                    sum(float(p.detach().sum()) for p in model.parameters())

        return timed(work, n * 4 * facts["params"])

    return Prepared(run, facts)
