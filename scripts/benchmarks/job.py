"""What a contender is asked to do: plain data, which a worker process gets as JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["ceilings", "train", "prefill", "decode", "load"]


@dataclass(frozen=True)
class Job:
    """The work, the same for every contender.

    - `config`: the model's `GPTConfig.to_dict()`.
    - `hf`: the same as the fields of a config.json, if an architecture of transformers holds it.
    - `source`: files with the weights, None for random ones.
    - `seq`: tokens of a sequence: those trained on, or those of the prompt.
    - `new_tokens`: decoded after the prompt; `temperature` 0 is greedy.
    - `round_seconds`: about how long a round of timing takes.
    """

    task: Task
    config: dict[str, Any] = field(default_factory=dict)
    hf: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    batch_size: int = 1
    seq: int = 1
    new_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    round_seconds: float = 2.0


@dataclass(frozen=True)
class Contender:
    """Who does it: a module of this package with `prepare(job, settings) -> Prepared`.

    - `settings`: what the module lets one choose, such as the precision.
    - `tuned`: its process gets what our commands set for theirs (`scripts/environment.py`).
    """

    name: str
    module: str
    settings: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False


def to_json(contender: Contender, job: Job) -> str:
    asked = {"module": contender.module, "settings": contender.settings}
    return json.dumps({**asked, "job": dataclasses.asdict(job)})
