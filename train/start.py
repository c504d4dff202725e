"""What a run starts from: its model, new or pretrained, and the state of step 0."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from eqx_gpt import lora
from eqx_gpt.config import GPTConfig
from eqx_gpt.gpt import GPT
from eqx_gpt.ops.onednn import Products
from eqx_gpt.shapes import PRNGKey
from eqx_gpt.tree import cast
from train.config import TrainConfig, architecture, model_config
from train.manifest import Manifest
from train.mesh import placed
from train.optimizer import make_optimizer, trainable
from train.step import Recipe, TrainState


def started_model(
    config: TrainConfig, data: Manifest, pretrained: GPT | None
) -> tuple[TrainConfig, GPTConfig]:
    """The model that a new run trains, and the run's config, which says its shape."""
    if pretrained is None:
        return config, model_config(config, data.vocab_size)
    model_cfg = pretrained.config
    shape = architecture(model_cfg)
    for name, value in shape.items():
        asked = getattr(config, name)
        if asked not in (value, getattr(TrainConfig(), name)):
            raise ValueError(
                f"{name}={asked} contradicts {config.init_from!r}, which has {value}; leave it out"
            )
    if config.block_size > model_cfg.block_size:
        raise ValueError(
            f"block_size={config.block_size} exceeds the {model_cfg.block_size} that "
            f"{config.init_from!r} was made for; give --block_size {model_cfg.block_size} or less"
        )
    if data.vocab_size > model_cfg.vocab_size:
        raise ValueError(
            f"dataset {data.name!r} has {data.vocab_size} tokens, {config.init_from!r} knows "
            f"{model_cfg.vocab_size}; prepare the dataset with that model's tokenizer"
        )
    config = dataclasses.replace(config, **shape)
    return config, as_trained(config, model_cfg)


def as_trained(config: TrainConfig, pretrained: GPTConfig) -> GPTConfig:
    """A pretrained model as a run of `config` goes on with it."""
    # Rotary models lose nothing by a longer block_size than they are trained on.
    crops = pretrained.position.kind == "learned"
    block_size = config.block_size if crops else pretrained.block_size
    return dataclasses.replace(
        pretrained, dropout=config.dropout, attention_dropout=config.attention_dropout,
        block_size=block_size, remat=config.remat,
    )  # fmt: skip


@eqx.filter_jit
def new_state(
    config: TrainConfig, model_cfg: GPTConfig, key: PRNGKey, pretrained: GPT | None
) -> TrainState:
    if pretrained is None:
        model = GPT.init(model_cfg, key=key)
        if config.zero_init:
            model = with_silent_blocks(model)
    else:
        model = pretrained.crop_block_size(model_cfg.block_size).with_config(model_cfg)
    if config.lora is not None:
        model = lora.init(model, config.lora, key=jax.random.fold_in(key, 1))
    # Placed before as well: the optimizer's moments are made like the weights.
    model = placed(model)
    return placed(
        TrainState.init(
            model,
            make_optimizer(config),
            trainable(config, model),
            averaged=config.ema_decay > 0,
        )
    )


def with_silent_blocks(model: GPT) -> GPT:
    """With zero in what the blocks write to the residual stream through, as at the start of Fixup
    (arXiv:1901.09321): each block then begins as the identity."""
    return eqx.tree_at(
        lambda model: (model.blocks.attention.out.weight, model.blocks.mlp.down.weight),
        model,
        replace_fn=jnp.zeros_like,
    )


def recipe(
    config: TrainConfig, dtype: DTypeLike, key: PRNGKey, products: Products = "xla"
) -> Recipe:
    """What stays fixed over the run."""
    return Recipe(
        make_optimizer(config), dtype, key, config.z_loss, config.label_smoothing,
        config.ema_decay, config.skip_spikes, products,
    )  # fmt: skip


def computing(state: TrainState, dtype: DTypeLike) -> TrainState:
    """With the frozen parts in the dtype of the products, to which each step would cast them."""
    return eqx.tree_at(lambda s: s.frozen, state, cast(state.frozen, dtype))


def skeleton(config: TrainConfig, model_cfg: GPTConfig, dtype: DTypeLike) -> TrainState:
    """The state's shapes and dtypes. ValueError for names in the config that fit nothing."""
    key = jax.random.key(0)
    state = eqx.filter_eval_shape(new_state, config, model_cfg, key, None)
    return eqx.filter_eval_shape(computing, state, dtype)
