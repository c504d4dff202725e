"""What a run says of itself before its first step."""

from jax.sharding import Mesh

from eqx_gpt.config import GPTConfig
from train.config import TrainConfig
from train.data import Windows
from train.devices import Execution, describe_arithmetic, describe_devices
from train.manifest import Manifest
from train.mesh import describe_mesh
from train.packing import PackedWindows, describe_packing


def header(
    config: TrainConfig,
    model_cfg: GPTConfig,
    data: Manifest,
    *,
    windows: Windows | PackedWindows,
    execution: Execution,
    n_params: int,
    n_frozen: int,
    peak_flops: float | None,
    steps_done: int,
    mesh: Mesh | None = None,
) -> dict[str, str]:
    """What is printed before the first step, by what it is about."""
    splits = data.splits
    n_tokens = config.global_batch_size * config.block_size
    packed = isinstance(windows, PackedWindows)
    peak = "unknown peak" if peak_flops is None else f"peak {peak_flops:.3g} FLOP/s"
    if steps_done:
        start = f"resumed at step {steps_done}"
    else:
        start = "new" if config.init_from == "scratch" else f"from {config.init_from}"
    learning = f", {n_params - n_frozen:,} of them learning" if n_frozen else ""
    return {
        "model": f"{n_params:,} parameters{learning}: {model_cfg.n_layer} layers, "
        f"{model_cfg.n_head} heads, {model_cfg.n_embd} wide, block {model_cfg.block_size}, "
        f"vocabulary {model_cfg.vocab_size}; {start}",
        "data": f"{data.name}: {splits['train'].tokens:,} training tokens, "
        f"{splits['val'].tokens:,} for validation{describe_packing(windows)}",
        "device": f"{describe_devices()}{describe_mesh(mesh, model_cfg)}, "
        f"{describe_arithmetic(execution, model_cfg, config.block_size, packed)}, {peak}",
        "batch": f"{config.global_batch_size} x {config.block_size} = {n_tokens:,} tokens a "
        f"step, in {execution.n_micro} micro-batches of {execution.micro_batch_size}, "
        f"accumulated on the {execution.accumulate}",
        "run": f"{config.max_iters:,} steps, into {config.out_dir}",
    }
