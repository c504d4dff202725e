"""llama.cpp as a contender, on a GGUF file as it is, one sequence at a time."""

import os
import random
import time
from typing import Any

import llama_cpp

from scripts.benchmarks.job import Job
from scripts.benchmarks.serve import Prepared


def prepare(job: Job, settings: dict[str, Any]) -> Prepared:
    """On every core, which llama-cpp-python would not take by itself. `repack`: weights laid out
    anew for this processor, as it does by default; there are processors where that crashes."""
    assert job.source is not None
    if not settings["repack"]:
        default = llama_cpp.llama_cpp.llama_model_default_params

        def as_in_the_file() -> Any:
            params = default()
            params.use_extra_bufts = False
            return params

        llama_cpp.llama_cpp.llama_model_default_params = as_in_the_file
    threads = os.cpu_count() or 1
    model = llama_cpp.Llama(
        job.source, n_ctx=job.seq + job.new_tokens + 1, n_threads=threads,
        n_threads_batch=threads, verbose=False,
    )  # fmt: skip
    rng = random.Random(0)
    prompt = [rng.randrange(model.n_vocab()) for _ in range(job.seq)]

    def prefill(n: int) -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(n):
            model.reset()
            model.eval(prompt)
        return time.perf_counter() - start, n * job.seq

    def decode(n: int) -> tuple[float, float]:
        seconds = 0.0
        for _ in range(n):
            tokens = model.generate(
                prompt, top_k=job.top_k or 0, top_p=1.0, min_p=0.0, temp=job.temperature
            )
            next(tokens)  # after the prefill
            start = time.perf_counter()
            for _ in range(job.new_tokens):
                next(tokens)
            seconds += time.perf_counter() - start
        return seconds, n * job.new_tokens

    run = {"prefill": prefill, "decode": decode}[job.task]
    return Prepared(run, {"threads": threads})
