"""nanoGPT's run in PyTorch: the same job as scripts/train.py, as nanoGPT does it on a CPU.

python scripts/benchmarks/torch_run.py CONFIG.json DATA_DIR OUT_DIR: float32, not compiled,
windows drawn anew from the mapped file for each step, evaluations every `eval_interval` steps,
the best one's checkpoint kept. At the end the loss over the whole validation split.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from scripts.benchmarks.torch_gpt import Shape, TorchGPT, adamw  # noqa: E402


def main(config: dict[str, Any], data_dir: Path, out_dir: Path) -> None:
    meta = json.loads((data_dir / "meta.json").read_text(encoding="utf-8"))
    torch.manual_seed(config["seed"])
    names = ("block_size", "n_layer", "n_head", "n_embd", "bias")
    model = TorchGPT(Shape(vocab_size=meta["vocab_size"], **{k: config[k] for k in names}))
    optimizer = adamw(model, lr=config["learning_rate"], betas=(config["beta1"], config["beta2"]))
    best = math.inf

    def tokens_of(split: str) -> np.ndarray:
        return np.memmap(data_dir / f"{split}.bin", dtype=np.dtype(meta["dtype"]), mode="r")

    def batch(split: str) -> tuple[Tensor, Tensor]:
        tokens = tokens_of(split)  # mapped anew each time, as nanoGPT does against a leak
        seq = config["block_size"]
        starts = torch.randint(len(tokens) - seq, (config["batch_size"],))
        windows = np.stack([tokens[i : i + seq + 1].astype(np.int64) for i in starts.tolist()])
        windows = torch.from_numpy(windows)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    @torch.no_grad()
    def sampled_loss(split: str) -> float:
        return (
            sum(model(*batch(split)).item() for _ in range(config["eval_iters"]))
            / config["eval_iters"]
        )

    for step in range(config["max_iters"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        if step % config["eval_interval"] == 0 and step:
            losses = {split: sampled_loss(split) for split in ("train", "val")}
            print(f"eval {step} {losses}", flush=True)
            if losses["val"] < best:
                best = losses["val"]
                torch.save([model.state_dict(), optimizer.state_dict()], out_dir / "ckpt.pt")
        if step == config["max_iters"]:
            break
        loss = model(*batch("train"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % config["log_interval"] == 0:
            print(f"iter {step}/{config['max_iters']} loss {loss.item():.4f}", flush=True)
    print(
        f"whole split {whole_loss(model, tokens_of('val'), config['block_size']):.4f}", flush=True
    )


@torch.no_grad()
def whole_loss(model: TorchGPT, tokens: np.ndarray, seq: int, rows: int = 64) -> float:
    """Over consecutive blocks; the tokens after the last whole one are left out."""
    n_block = (len(tokens) - 1) // seq
    total = 0.0
    for first in range(0, n_block, rows):
        starts = np.arange(first, min(first + rows, n_block)) * seq
        windows = torch.from_numpy(tokens[starts[:, None] + np.arange(seq + 1)].astype(np.int64))
        total += len(starts) * model(windows[:, :-1], windows[:, 1:]).item()
    return total / n_block


def learning_rate(config: dict[str, Any], step: int) -> float:
    """nanoGPT's warm-up and cosine."""
    high, low = config["learning_rate"], config["min_lr"]
    warmup, end = config["warmup_iters"], config["lr_decay_iters"]
    if not config["decay_lr"]:
        return high
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    if step > end:
        return low
    share = (step - warmup) / (end - warmup)
    return low + 0.5 * (1 + math.cos(math.pi * share)) * (high - low)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), *map(Path, sys.argv[2:]))
