"""nanoGPT's model and step in PyTorch, written afresh: the peer for models shaped like GPT-2.

The model and its training are those of https://github.com/karpathy/nanoGPT (MIT licence).
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.benchmarks.job import Job
from scripts.benchmarks.serve import Prepared

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Shape:
    """What a GPT-2 can differ in."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool


class LayerNorm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.n_embd))
        self.bias = nn.Parameter(torch.zeros(shape.n_embd)) if shape.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.norm1, self.norm2 = LayerNorm(shape), LayerNorm(shape)
        n, bias = shape.n_embd, shape.bias
        self.qkv, self.out = nn.Linear(n, 3 * n, bias=bias), nn.Linear(n, n, bias=bias)
        self.up, self.down = nn.Linear(n, 4 * n, bias=bias), nn.Linear(4 * n, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, n_embd = x.shape
        qkv = self.qkv(self.norm1(x)).split(n_embd, dim=2)
        q, k, v = (y.view(batch, seq, self.n_head, -1).transpose(1, 2) for y in qkv)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, n_embd))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class TorchGPT(nn.Module):
    """`forward(tokens, targets)` is the mean loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = LayerNorm(shape)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * shape.n_layer) if deep else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def adamw(model: nn.Module, *, fused: bool = False, **settings: Any) -> torch.optim.AdamW:
    """Matrices and embeddings decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings = {"lr": 6e-4, "betas": (0.9, 0.95), **settings}
    return torch.optim.AdamW(groups, fused=fused or None, **settings)


def autocast(precision: str) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(DEVICE, dtype=torch.bfloat16)


def prepare(job: Job, settings: dict[str, Any]) -> Prepared:
    """Settings: `precision`, float32 or bfloat16; `compile`; `fused`, the optimizer."""
    config = job.config
    shape = Shape(
        max(job.seq, config["block_size"]), config["vocab_size"], config["n_layer"],
        config["n_head"], config["n_embd"], config["mlp"]["bias"],
    )  # fmt: skip
    return prepare_training(TorchGPT(shape), job, settings)


def prepare_training(model: nn.Module, job: Job, settings: dict[str, Any]) -> Prepared:
    """Steps of a model that takes (tokens, targets): forward, backward, clip, AdamW."""
    model = model.to(DEVICE)
    optimizer = adamw(model, fused=settings["fused"])
    vocab_size = job.config["vocab_size"]
    windows = torch.randint(vocab_size, (job.batch_size, job.seq + 1), device=DEVICE)
    tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    compiled: Any = torch.compile(model) if settings["compile"] else model

    def run(n: int) -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(n):
            with autocast(settings["precision"]):
                loss = compiled(tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, n * job.batch_size * job.seq

    n_params = sum(p.numel() for p in model.parameters())
    return Prepared(run, {"params": n_params, "threads": torch.get_num_threads()})
