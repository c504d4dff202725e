"""`TrainConfig`: everything that decides a run, flat and in nanoGPT's names."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

from eqx_gpt.config import (
    AttentionConfig,
    GPTConfig,
    LoRAConfig,
    MLPConfig,
    NormConfig,
    PositionConfig,
    did_you_mean,
)

Precision = Literal["auto", "float32", "bfloat16"]
OptimizerName = Literal["adamw", "muon", "lion", "adafactor"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
StateDtype = Literal["float32", "bfloat16"]
Position = Literal["learned", "rope", "none"]
NormName = Literal["layernorm", "rmsnorm"]
MLPName = Literal["plain", "gated"]
Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]
QKNorm = Literal["none", "head", "all_heads"]
Head = Literal["tied", "untied"]
Remat = Literal["none", "block", "dots"]


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
    """Sequences in a micro-batch. auto: as many as fit, in fewer or more of them, so that a step
    takes as many sequences as it would with the preset's or the file's."""
    gradient_accumulation_steps: int = 40
    """Micro-batches in an optimizer step."""
    micro_batch_size: int | None = None
    """Sequences run at once, a divisor of batch_size. None: batch_size; on a CPU less, where one
    would take long, or of a small model leave the caches. Without dropout the result is the same
    but for rounding."""
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
    attention_dropout: float | None = None
    """That of attention weights alone. 0 is for the fused attention of GPUs and TPUs, which has
    none. None: as dropout."""
    bias: bool = False
    """Biases in linear maps and layer norms, as in GPT-2; without is a little faster."""
    vocab_size: int | None = None
    """Rows of the embedding. None: the tokenizer's, and from 4096 on the next multiple of 64
    (50304 for GPT-2's 50257)."""
    position: Position = "learned"
    """How positions enter: a learned table, rotations of queries and keys (rope), not at all."""
    rope_theta: float | None = None
    """Base of rope's wavelengths. None: 10000."""
    norm: NormName = "layernorm"
    """What normalises the residual stream."""
    activation: Activation = "gelu_tanh"
    """Of the mlp; relu2 is relu squared."""
    mlp: MLPName = "plain"
    """plain: down(act(up(x))); gated: down(act(gate(x)) * up(x))."""
    n_inner: int | None = None
    """Hidden width of the mlp. None: 4 * n_embd."""
    n_kv_head: int | None = None
    """Heads of keys and values, a divisor of n_head. None: n_head."""
    qk_norm: QKNorm = "none"
    """Normalise queries and keys: each head by itself, or all heads together."""
    head: Head = "tied"
    """tied: the output shares the token embedding; untied: it learns its own."""
    logit_softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap). None: they stay."""
    zero_init: bool = False
    """Start with zero in the projections that write to the residual stream."""

    optimizer: OptimizerName = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest."""
    learning_rate: float = 6e-4
    """The highest learning rate."""
    muon_learning_rate: float = 0.02
    """Muon's highest learning rate; it follows the schedule of learning_rate."""
    muon_beta: float = 0.95
    """Muon's momentum."""
    lr_scale: str = ""
    """Learning rates of some arrays, as parts of it: pattern=factor, apart by commas, over names
    such as wte.weight and blocks.mlp.up.weight; the last that fits counts."""
    max_iters: int = 600_000
    """Optimizer steps in all."""
    weight_decay: float = 0.1
    """Decoupled, of matrices, adapters and embeddings alone."""
    decay_scale: str = ""
    """Weight decay of some arrays, as parts of it, written as lr_scale."""
    moment_dtype: StateDtype = "float32"
    """What the optimizer keeps its averages of gradients in; bfloat16 takes half the memory."""
    z_loss: float = 0.0
    """Weight of the mean squared log of the softmax's denominator, added to the loss trained on."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all tokens, in the loss trained on."""
    ema_decay: float = 0.0
    """Of an exponential average of the weights, which is then evaluated, sampled and loaded in
    their place. 0: none."""
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
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 is no limit."""
    skip_spikes: float = 0.0
    """A step is skipped if its gradient's norm is more than so many times the median of the last
    128, 10 say; 0: only if it is not finite, as always."""
    max_skipped: int = 10
    """Steps skipped in a row that end the run, with an error that names the data."""
    decay_lr: bool = True
    """Warm-up, then decay as lr_schedule says; otherwise the learning rate is constant."""
    lr_schedule: Schedule = "cosine"
    """After the warm-up: down by a cosine, by a line, constant until the last wsd_decay and then
    by a line (wsd: warm-up, stable, decay), or constant."""
    wsd_decay: float = 0.2
    """Share of lr_decay_iters that wsd's decay takes."""
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
    target_val_loss: float | None = None
    """Stop once the loss over the whole validation split is at most this, in the run's precision.
    Evaluations in training are then of that split, whole, and of no other."""
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
    keep_checkpoints: int = 2
    """The last so many are kept: should the newest be damaged, the one before it is taken."""
    preemption_s: float = 0.0
    """Seconds from the scheduler's SIGTERM to its SIGKILL: a run that cannot save its step by then
    ends with its last checkpoint. 0: it takes its time."""

    precision: Precision = "auto"
    """What the model computes in; parameters and optimizer are float32. auto: bfloat16 where the
    device multiplies it (accelerators; CPUs with AVX512-BF16 or AMX), else float32."""
    products: Literal["auto", "xla", "onednn"] = "auto"
    """The library of the linear maps' bfloat16 products on a CPU. auto: onednn with AMX and one
    device, for models wider than 512, whose steps it makes a tenth shorter. Its programs cannot be
    kept, so that each start compiles for 5 to 20 s."""
    remat: Remat = "none"
    """Activations to make again in the backward pass instead of keeping them: none; all within a
    block; all but the results of its matrix products (dots)."""
    mesh: str = "auto"
    """How the devices are arranged, such as data=2,fsdp=2,tensor=2: batches are split over data and
    fsdp, weights and optimizer over fsdp and tensor, heads over tensor. auto: data over processes,
    fsdp over the devices of each; within a CPU, data."""
    wandb_log: bool = False
    """Log to Weights & Biases as well: pip install 'eqx-gpt[wandb]'."""
    wandb_project: str = "eqx_gpt"
    """Its project."""
    wandb_run_name: str | None = None
    """Its name of the run. None: that of out_dir."""
    tensorboard_log: bool = False
    """Log to TensorBoard as well, in out_dir/tensorboard: pip install 'eqx-gpt[tensorboard]'."""
    profile: str | None = None
    """Steps to trace, such as 10:13 for 10, 11 and 12, for Perfetto; in out_dir/profile."""

    def __post_init__(self) -> None:
        positive = (
            "batch_size", "gradient_accumulation_steps", "block_size", "n_layer", "n_head",
            "n_embd", "max_iters", "eval_interval", "eval_iters", "log_interval", "lr_decay_iters",
            "max_skipped", "keep_checkpoints",
        )  # fmt: skip
        for name in (*positive, "micro_batch_size", "vocab_size", "checkpoint_interval", "n_inner",
                     "n_kv_head"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("lora_rank", "warmup_iters", "sample_interval", "seed", "weight_decay",
                     "grad_clip", "learning_rate", "min_lr", "checkpoint_minutes",
                     "muon_learning_rate", "z_loss", "preemption_s"):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}")
        if self.skip_spikes != 0 and not 1 < self.skip_spikes < float("inf"):
            raise ValueError(f"skip_spikes must be 0 or above 1, got {self.skip_spikes}")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha}")
        for name in ("rope_theta", "logit_softcap", "target_val_loss"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 < self.wsd_decay <= 1:
            raise ValueError(f"wsd_decay must be in (0, 1], got {self.wsd_decay}")
        for name in ("beta1", "beta2", "dropout", "attention_dropout", "muon_beta",
                     "label_smoothing", "ema_decay"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        first, colon, stop = (self.profile or "0:1").partition(":")
        if not (colon and first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
            raise ValueError(
                f"profile must be FIRST:STOP, such as 10:13 for the steps 10, 11 and 12, got "
                f"{self.profile!r}"
            )
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
        if not self.decay_lr and self.lr_schedule != "cosine":
            raise ValueError(
                f"lr_schedule={self.lr_schedule!r} says nothing with decay_lr=False, which is a "
                "constant learning rate; leave one of them out"
            )
        if self.optimizer == "muon" and self.learning_rate == 0:
            raise ValueError(
                "learning_rate=0 gives muon no schedule; freeze what shall not learn with --freeze"
            )
        runs_adam = self.optimizer in ("adamw", "muon")
        if self.moment_dtype == "bfloat16" and runs_adam and self.beta2 > 0.99:
            raise ValueError(
                f"beta2={self.beta2} adds less to the second moment than moment_dtype='bfloat16' "
                "can hold; give --beta2 0.99 or less, or keep the moments in float32"
            )
        if self.profiled.stop > self.max_iters:
            raise ValueError(
                f"profile={self.profile!r} goes beyond max_iters={self.max_iters}; give earlier "
                "steps"
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

    def check_new(self) -> None:
        """ValueError for what a run should not begin with; one that has it may go on."""
        added = self.max_iters**-0.8  # as optax's rule does in the last step
        if self.optimizer == "adafactor" and self.moment_dtype == "bfloat16" and added < 0.01:
            raise ValueError(
                f"with max_iters={self.max_iters} adafactor's last step adds {added:.2g} of its "
                "gradient's squares to the second moment, less than moment_dtype='bfloat16' can "
                "hold; leave the moments in float32: they are a row and a column of each matrix"
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
    def profiled(self) -> range:
        """The steps to trace."""
        return range(*map(int, (self.profile or "0:0").split(":")))

    @property
    def global_batch_size(self) -> int:
        """Sequences in an optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


def architecture(model: GPTConfig) -> dict[str, Any]:
    """The fields of `TrainConfig` that say this model, as far as they can."""
    return {
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "bias": model.mlp.bias,
        "vocab_size": model.vocab_size,
        "position": model.position.kind,
        "rope_theta": model.position.rope_theta if model.position.kind == "rope" else None,
        "norm": model.norm.kind,
        "activation": model.mlp.activation,
        "mlp": model.mlp.kind,
        "n_inner": model.mlp.n_inner,
        "n_kv_head": model.attention.n_kv_head,
        "qk_norm": model.attention.qk_norm,
        "head": model.head,
        "logit_softcap": model.logit_softcap,
        "zero_init": False,
    }


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
        attention_dropout=config.attention_dropout,
        head=config.head,
        logit_softcap=config.logit_softcap,
        norm=NormConfig(config.norm, bias=config.bias and config.norm == "layernorm"),
        position=PositionConfig(
            config.position,
            rope_theta=10_000.0 if config.rope_theta is None else config.rope_theta,
        ),
        attention=AttentionConfig(
            config.n_kv_head, qkv_bias=config.bias, out_bias=config.bias, qk_norm=config.qk_norm
        ),
        mlp=MLPConfig(config.mlp, config.activation, config.n_inner, bias=config.bias),
        remat=config.remat,
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
    if get_origin(annotation) is Literal:
        if value in args:
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(repr, args))}, got {value!r}")
    if float in args and type(value) is int:
        return float(value)
    if type(value) in args:
        return value
    expected = " or ".join("null" if a is type(None) else a.__name__ for a in args)
    raise ValueError(f"{name} must be {expected}, got {value!r}")
