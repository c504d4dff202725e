"""`TrainConfig`: everything that decides a run, flat and in nanoGPT's names."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eqx_gpt.config import (
    AttentionConfig,
    GPTConfig,
    LoRAConfig,
    MLPConfig,
    NormConfig,
    did_you_mean,
)

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """One optimizer step takes batch_size * gradient_accumulation_steps sequences of block_size."""

    # Each docstring below is the flag's help text.
    out_dir: str = "out"
    """Where the run goes: run.json, metrics.jsonl, checkpoints."""
    init_from: str = "scratch"
    """scratch, resume (the run in out_dir), or pretrained weights: a model of the zoo, a hub id,
    a local directory, a .gguf file, another run."""
    seed: int = 1337
    """Decides the initial weights, the order of the data and dropout."""

    dataset: str = "openwebtext"
    """A dataset prepared by scripts/prepare.py."""
    data_dir: str = "data"
    """Where prepared datasets are."""
    batch_size: int = 12
    """Sequences in a micro-batch."""
    gradient_accumulation_steps: int = 40
    """Micro-batches in an optimizer step."""
    micro_batch_size: int | None = None
    """Sequences run at once, a divisor of batch_size. None: batch_size, less where one micro-batch
    would take long (on a CPU). Without dropout the result is the same but for rounding."""
    block_size: int = 1024
    """Tokens in a sequence."""

    n_layer: int = 12
    """Blocks."""
    n_head: int = 12
    """Attention heads."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Probability; 0 for pretraining, 0.1 and more for finetuning or small data."""
    bias: bool = False
    """Biases in linear maps and layer norms, as in GPT-2; without is a little faster."""
    vocab_size: int | None = None
    """Rows of the embedding. None: the tokenizer's, and from 4096 on the next multiple of 64
    (50304 for GPT-2's 50257)."""

    learning_rate: float = 6e-4
    """The highest learning rate."""
    max_iters: int = 600_000
    """Optimizer steps in all."""
    weight_decay: float = 0.1
    """AdamW's, of matrices, adapters and embeddings alone."""
    lora_rank: int = 0
    """Rank of the low-rank adapters (LoRA) that alone are trained, on frozen weights. 0: none, the
    weights are trained."""
    lora_alpha: float = 16.0
    """What an adapter adds is multiplied by lora_alpha / lora_rank."""
    lora_targets: str = "blocks.*"
    """The linear maps to adapt: patterns, apart by commas, over names such as blocks.attention.qkv
    and blocks.mlp.up."""
    freeze: str = ""
    """Arrays to leave as they are: patterns, apart by commas, over names such as wte.weight and
    blocks.mlp.up.weight. Empty: none."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 is no limit."""
    decay_lr: bool = True
    """Warm-up, then cosine decay; otherwise the learning rate is constant."""
    warmup_iters: int = 2000
    """Steps of linear warm-up."""
    lr_decay_iters: int = 600_000
    """The step at which the learning rate reaches min_lr."""
    min_lr: float = 6e-5
    """The learning rate after its decay."""

    eval_interval: int = 2000
    """Steps between evaluations; there is one more at the end, and one of pretrained weights."""
    eval_iters: int = 200
    """Batches of batch_size in an evaluation of each split, the same ones every time."""
    eval_only: bool = False
    """Evaluate once and stop."""
    log_interval: int = 1
    """Steps between lines of metrics."""
    sample_interval: int = 0
    """Steps between samples of text; 0 is never."""
    always_save_checkpoint: bool = True
    """False: also keep the best evaluation's model, which sampling then uses."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints. None: eval_interval."""
    checkpoint_minutes: float = 15.0
    """Minutes after which a checkpoint is written in any case; 0 is never."""

    precision: Precision = "auto"
    """What the model computes in; parameters and optimizer are float32. auto: bfloat16 on an
    accelerator, float32 on a CPU."""
    mesh: str = "auto"
    """How the devices are arranged, such as data=2,fsdp=2,tensor=2: batches are split over data and
    fsdp, weights and optimizer over fsdp and tensor, heads over tensor. auto: data over processes,
    fsdp over the devices of each."""
    wandb_log: bool = False
    """Log to Weights & Biases as well: pip install 'eqx-gpt[wandb]'."""
    wandb_project: str = "eqx_gpt"
    """Its project."""
    wandb_run_name: str | None = None
    """Its name of the run. None: that of out_dir."""
    tensorboard_log: bool = False
    """Log to TensorBoard as well, in out_dir/tensorboard: pip install 'eqx-gpt[tensorboard]'."""

    def __post_init__(self) -> None:
        positive = (
            "batch_size", "gradient_accumulation_steps", "block_size", "n_layer", "n_head",
            "n_embd", "max_iters", "eval_interval", "eval_iters", "log_interval", "lr_decay_iters",
        )  # fmt: skip
        for name in (*positive, "micro_batch_size", "vocab_size", "checkpoint_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("lora_rank", "warmup_iters", "sample_interval", "seed", "weight_decay",
                     "grad_clip", "learning_rate", "min_lr", "checkpoint_minutes"):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha}")
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        _ = self.mesh_shape

    def check_together(self) -> None:
        """ValueError for fields that contradict each other.

        Apart from construction, for a file may be completed by flags.
        """
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide "
                f"batch_size={self.batch_size}"
            )
        if self.decay_lr and self.warmup_iters >= self.lr_decay_iters:
            raise ValueError(
                f"warmup_iters={self.warmup_iters} must be below "
                f"lr_decay_iters={self.lr_decay_iters}; for a run of max_iters={self.max_iters} "
                "set all three, or --decay_lr False"
            )

        if self.lora_rank and self.freeze:
            raise ValueError(
                f"freeze={self.freeze!r} says nothing with lora_rank={self.lora_rank}: all but the "
                "adapters is frozen; leave one of them out, or choose with --lora_targets"
            )
        if self.lora_rank and self.init_from == "scratch":
            raise ValueError(
                f"lora_rank={self.lora_rank} adapts trained weights, and init_from='scratch' has "
                "none; name a model with --init_from"
            )

    @property
    def mesh_shape(self) -> dict[str, int] | None:
        """The sizes of the mesh's axes; None for auto."""
        if self.mesh == "auto":
            return None
        found = re.fullmatch(r"(\w+=[1-9]\d*)(,\w+=[1-9]\d*)*", self.mesh.replace(" ", ""))
        pairs = [] if found is None else [part.split("=") for part in found[0].split(",")]
        axes = [axis for axis, _ in pairs]
        if not axes or not set(axes) <= {"data", "fsdp", "tensor"} or len(set(axes)) < len(axes):
            raise ValueError(
                f"mesh={self.mesh!r} is none; give sizes of data, fsdp and tensor, each once, such "
                "as data=2,fsdp=4, or auto"
            )
        return {axis: int(n) for axis, n in pairs}

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters that are trained, or None."""
        if not self.lora_rank:
            return None
        return LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_targets)

    @property
    def global_batch_size(self) -> int:
        """Sequences in an optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


def model_config(config: TrainConfig, n_token: int) -> GPTConfig:
    """The model of a run from scratch, for a tokenizer of `n_token` tokens."""
    padded = n_token if n_token < 4096 else -(-n_token // 64) * 64
    vocab_size = padded if config.vocab_size is None else config.vocab_size
    if vocab_size < n_token:
        raise ValueError(
            f"vocab_size={vocab_size} is less than the {n_token} tokens of dataset "
            f"{config.dataset!r}; leave it out, or give at least {n_token}"
        )
    return GPTConfig(
        block_size=config.block_size,
        vocab_size=vocab_size,
        n_token=n_token if n_token < vocab_size else None,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        dropout=config.dropout,
        norm=NormConfig(bias=config.bias),
        attention=AttentionConfig(qkv_bias=config.bias, out_bias=config.bias),
        mlp=MLPConfig(bias=config.bias),
    )


def with_fields(base: TrainConfig, fields: Mapping[str, Any], source: str) -> TrainConfig:
    """`base` with some fields replaced. ValueError, naming `source`, for a field that does not
    exist or whose value has the wrong type."""
    known = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    checked = {}
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{source}: no field {name!r}; {did_you_mean(name, known)}")
        checked[name] = _typed(known[name], value, f"{source}: {name}")
    try:
        return dataclasses.replace(base, **checked)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The fields of a JSON config, whole or partial, or of a run's `run.json`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config file {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"config file {str(path)!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config file {str(path)!r}: expected an object of fields")
    is_run = "format_version" in content
    fields = content.get("config") if is_run else content
    if not isinstance(fields, dict):
        raise ValueError(f"config file {str(path)!r}: its field 'config' is no object")
    return fields


def _typed(annotation: Any, value: Any, name: str) -> Any:
    """A JSON value as the annotated type; whole numbers pass for floats."""
    args = getattr(annotation, "__args__", (annotation,))
    if annotation is Precision:
        if value in args:
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(repr, args))}, got {value!r}")
    if float in args and type(value) is int:
        return float(value)
    if type(value) in args:
        return value
    expected = " or ".join("null" if a is type(None) else a.__name__ for a in args)
    raise ValueError(f"{name} must be {expected}, got {value!r}")
