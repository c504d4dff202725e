"""Named recipes: nanoGPT's config files, with the same numbers, and faster ones of ours."""

from dataclasses import replace

from eqx_gpt.config import did_you_mean
from train.config import TrainConfig

# Learning rates of the larger ones: those of GPT-3 (arXiv:2005.14165, table 2.1).
# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens a step; 300 B tokens in all.
_GPT2_SMALL = TrainConfig(out_dir="out/gpt2-small", eval_interval=1000, log_interval=10)

# A character-level model of tiny Shakespeare, which overfits: the best evaluation is kept.
_SHAKESPEARE_CHAR = TrainConfig(
    out_dir="out/shakespeare-char",
    dataset="shakespeare_char",
    batch_size=64,
    gradient_accumulation_steps=1,
    block_size=256,
    n_layer=6,
    n_head=6,
    n_embd=384,
    dropout=0.2,
    learning_rate=1e-3,
    max_iters=5000,
    warmup_iters=100,
    lr_decay_iters=5000,
    min_lr=1e-4,
    beta2=0.99,
    eval_interval=250,
    eval_iters=200,
    log_interval=10,
    always_save_checkpoint=False,
)

_FINETUNE_SHAKESPEARE = TrainConfig(
    out_dir="out/finetune-shakespeare",
    init_from="gpt2-xl",
    dataset="shakespeare",
    batch_size=1,
    gradient_accumulation_steps=32,
    learning_rate=3e-5,
    decay_lr=False,
    max_iters=20,
    eval_interval=5,
    eval_iters=40,
    always_save_checkpoint=False,
)

# Low-rank adapters of a small model: on a CPU, in minutes.
_FINETUNE_SHAKESPEARE_LORA = TrainConfig(
    out_dir="out/finetune-shakespeare-lora",
    init_from="smollm2-135m",
    dataset="shakespeare_smollm2",
    lora_rank=16,
    lora_alpha=32.0,
    batch_size=8,
    gradient_accumulation_steps=1,
    block_size=256,
    learning_rate=1e-3,
    min_lr=1e-4,
    warmup_iters=20,
    max_iters=300,
    lr_decay_iters=300,
    weight_decay=0.0,
    beta2=0.99,
    eval_interval=100,
    eval_iters=20,
    log_interval=10,
)

# GPT-2 XL, all of it, in 24 GiB: float32 weights and gradients are 11.6 GiB, the optimizer's
# averages next to nothing, and a step has 19.1 at its peak.
_FINETUNE_SHAKESPEARE_24GB = replace(
    _FINETUNE_SHAKESPEARE,
    out_dir="out/finetune-shakespeare-24gb",
    gradient_accumulation_steps=1,
    optimizer="adafactor",
    remat="block",
    learning_rate=1e-5,
    max_iters=640,
    eval_interval=160,
    always_save_checkpoint=True,
    checkpoint_interval=640,
    checkpoint_minutes=0.0,
)

# Ours: the size of model and the data of nanoGPT's recipe, as fast as we can to the loss that it
# ends with, over the whole validation split. What was tried is in CONTRIBUTING.md.
_MODERN = {
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "relu2",
    "qk_norm": "head",
    "head": "untied",
    "zero_init": True,
    "optimizer": "muon",
    "muon_beta": 0.9,
    "beta1": 0.8,
    "beta2": 0.95,
    "lr_schedule": "linear",
    "min_lr": 0.0,
    "warmup_iters": 20,
}


def _eval(name: str) -> TrainConfig:
    """The zero-shot loss of a pretrained GPT-2 on OpenWebText."""
    return TrainConfig(
        out_dir=f"out/eval-{name}", init_from=name, batch_size=8, eval_iters=500, eval_only=True
    )


_SHAKESPEARE_CHAR_CPU = replace(
    _SHAKESPEARE_CHAR,
    out_dir="out/shakespeare-char-cpu",
    batch_size=12,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.0,
    max_iters=2000,
    lr_decay_iters=2000,
    eval_iters=20,
)

PRESETS: dict[str, TrainConfig] = {
    "gpt2-small": _GPT2_SMALL,
    "gpt2-medium": replace(
        _GPT2_SMALL,
        out_dir="out/gpt2-medium",
        n_layer=24,
        n_head=16,
        n_embd=1024,
        learning_rate=3e-4,
        min_lr=3e-5,
    ),
    "gpt2-large": replace(
        _GPT2_SMALL,
        out_dir="out/gpt2-large",
        n_layer=36,
        n_head=20,
        n_embd=1280,
        learning_rate=2.5e-4,
        min_lr=2.5e-5,
    ),
    "gpt2-xl": replace(
        _GPT2_SMALL,
        out_dir="out/gpt2-xl",
        n_layer=48,
        n_head=25,
        n_embd=1600,
        learning_rate=2e-4,
        min_lr=2e-5,
    ),
    "shakespeare-char": _SHAKESPEARE_CHAR,
    # The command that nanoGPT's README gives for a laptop.
    "shakespeare-char-cpu": _SHAKESPEARE_CHAR_CPU,
    "shakespeare-char-cpu-speedrun": replace(
        _SHAKESPEARE_CHAR_CPU,
        **_MODERN,
        out_dir="out/shakespeare-char-cpu-speedrun",
        learning_rate=2e-2,
        max_iters=260,
        lr_decay_iters=260,
        eval_interval=260,
        log_interval=25,
        target_val_loss=1.8857,
        always_save_checkpoint=True,
    ),
    # A quarter of nanoGPT's batch: Muon's part of a step is small, and smaller steps learn more.
    # Two epochs are too few to overfit in, so nothing is dropped out.
    "shakespeare-char-speedrun": replace(
        _SHAKESPEARE_CHAR,
        **(_MODERN | {"warmup_iters": 50}),
        out_dir="out/shakespeare-char-speedrun",
        batch_size=16,
        dropout=0.0,
        logit_softcap=15.0,
        learning_rate=1e-2,
        weight_decay=0.2,
        max_iters=450,
        lr_decay_iters=450,
        eval_interval=150,
        target_val_loss=1.4697,
        always_save_checkpoint=True,
    ),
    "finetune-shakespeare": _FINETUNE_SHAKESPEARE,
    "finetune-shakespeare-24gb": _FINETUNE_SHAKESPEARE_24GB,
    "finetune-shakespeare-lora": _FINETUNE_SHAKESPEARE_LORA,
    "eval-gpt2": _eval("gpt2"),
    "eval-gpt2-medium": _eval("gpt2-medium"),
    "eval-gpt2-large": _eval("gpt2-large"),
    "eval-gpt2-xl": _eval("gpt2-xl"),
}


def get_preset(name: str) -> TrainConfig:
    """ValueError, with the near names, if unknown."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
    return PRESETS[name]
