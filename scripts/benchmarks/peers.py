"""Who can be timed beside ours at each task: as it ships, and in its best configurations."""

import importlib.util
from typing import Any, Literal

from scripts.benchmarks.job import Contender, Job, Task

Peer = Literal["torch", "transformers", "llama.cpp"]
Environment = Literal["plain", "tuned", "both"]
Variant = Literal["float32", "bfloat16", "compile"]

_PACKAGES = {
    "torch": ("torch",),
    "transformers": ("torch", "transformers"),
    "llama.cpp": ("llama_cpp",),
}
_INSTALL = {
    "torch": "pip install torch",
    "transformers": "pip install torch transformers",
    "llama.cpp": "pip install llama-cpp-python",
}
_TASKS: dict[Peer, tuple[Task, ...]] = {
    "torch": ("train",),
    "transformers": ("train", "prefill", "decode", "load"),
    "llama.cpp": ("prefill", "decode"),
}

# The last is usually the fastest; the first is what nanoGPT does on a CPU.
_TRAINING: dict[Variant, dict[str, Any]] = {
    "float32": {"precision": "float32", "compile": False, "fused": False},
    "bfloat16": {"precision": "bfloat16", "compile": False, "fused": True},
    "compile": {"precision": "bfloat16", "compile": True, "fused": True},
}
_TRAINING_NAMES: dict[Variant, str] = {
    "float32": "float32",
    "bfloat16": "bfloat16 autocast",
    "compile": "bfloat16 autocast, compiled",
}


def check_installed(peer: Peer) -> None:
    """ValueError that says what to install."""
    for package in _PACKAGES[peer]:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--against {peer} needs {package}: {_INSTALL[peer]}")


def peers_of(
    names: tuple[Peer, ...], variants: tuple[Variant, ...], environment: Environment, job: Job
) -> list[Contender]:
    """ValueError for a peer that is not installed or cannot do the job."""
    contenders = []
    for peer in names:
        if job.task not in _TASKS[peer]:
            able = [name for name, tasks in _TASKS.items() if job.task in tasks]
            raise ValueError(
                f"{peer} is not timed at {job.task}; give --against {' or '.join(able)}"
            )
        check_installed(peer)
        _check_model(peer, job)
        for tuned in {"plain": (False,), "tuned": (True,), "both": (False, True)}[environment]:
            contenders += _contenders(peer, variants, tuned, job)
    return contenders


def _check_model(peer: Peer, job: Job) -> None:
    if peer == "torch" and job.hf.get("model_type", "gpt2") != "gpt2":
        raise ValueError(
            "--against torch is nanoGPT's model, shaped as GPT-2; this one is a "
            f"{job.hf['model_type']}: give --against transformers"
        )
    if peer == "transformers" and not job.hf and job.source is None:
        raise ValueError(
            "no architecture of transformers holds this model (a preset's has no biases); give "
            "--model, such as gpt2, or --against torch"
        )
    if peer == "llama.cpp":
        if job.source is None or not job.source.endswith(".gguf"):
            raise ValueError("--against llama.cpp needs a model in a .gguf file: give --model FILE")
        if job.batch_size != 1:
            raise ValueError(f"llama.cpp is timed at --batch_size 1, not {job.batch_size}")


def _contenders(
    peer: Peer, variants: tuple[Variant, ...], tuned: bool, job: Job
) -> list[Contender]:
    if peer == "llama.cpp":
        module = "scripts.benchmarks.llama_cpp_peer"
        return [
            Contender(f"{peer}{suffix}", module, {"repack": repack}, tuned)
            for suffix, repack in (("", True), (", weights as in the file", False))
        ]
    module = {"torch": "torch_gpt", "transformers": "transformers_peer"}[peer]
    module = f"scripts.benchmarks.{module}"
    if job.task == "train":
        return [
            Contender(f"{peer} {_TRAINING_NAMES[v]}", module, _TRAINING[v], tuned) for v in variants
        ]
    if job.task == "load":
        return [
            Contender(f"{peer}{suffix}", module, {"touch": touch}, tuned)
            for suffix, touch in (("", False), (", every number read", True))
        ]
    return [
        Contender(f"{peer} {v}", module, {"precision": v}, tuned)
        for v in variants
        if v != "compile"
    ]
