"""Update rules against those of torch and transformers, 20 steps on the same gradients."""

import dataclasses

import numpy as np
import pytest
import torch
import update_rules as ours
from transformers.optimization import Adafactor

from eqx_gpt.tree import named_arrays

pytestmark = pytest.mark.usefixtures("quick_compilation")

TORCH = {
    "adamw": lambda c: (
        lambda p: torch.optim.AdamW(p, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay)
    ),
    "adafactor": lambda c: (
        lambda p: Adafactor(
            p, lr=1.0, scale_parameter=False, relative_step=False, weight_decay=c.weight_decay
        )
    ),
}


def split(name: str, x: np.ndarray) -> list[torch.Tensor]:
    """The arrays that torch would hold: layer by layer."""
    layers = x if name.startswith("blocks.") else x[None]
    return [torch.tensor(np.asarray(layer), dtype=torch.float64) for layer in layers]


@pytest.mark.parametrize("name", TORCH)
def test_rule_is_theirs(name: str) -> None:
    config = dataclasses.replace(ours.CONFIG, optimizer=name)
    plain = dataclasses.replace(config, weight_decay=0.0)
    model = ours.new_model(config)
    arrays = {name: split(name, x) for name, x in named_arrays(model).items()}
    optimizers = {
        key: TORCH[name](config if key in ours.DECAYS else plain)(parameters)
        for key, parameters in arrays.items()
    }
    for step in range(ours.STEPS):
        for key, gradient in ours.gradients(step).items():
            for parameter, g in zip(arrays[key], split(key, gradient), strict=True):
                parameter.grad = g
            optimizers[key].param_groups[0]["lr"] = ours.rate(config, step)
            optimizers[key].step()
    expected = {key: np.stack([x.numpy() for x in layers]) for key, layers in arrays.items()}
    expected |= {key: x[0] for key, x in expected.items() if not key.startswith("blocks.")}
    ours.assert_close(ours.trained(config), expected, model, 2e-5)


def test_muon_is_torchs() -> None:
    """Both multiply in bfloat16, each in its order: so they agree as far as its digits do."""
    config = dataclasses.replace(ours.CONFIG, optimizer="muon", muon_learning_rate=0.01)
    model = ours.new_model(config)
    expected, optimizers = {}, {}
    for name in ("blocks.mlp.up.weight", "blocks.mlp.down.weight"):
        expected[name] = [x.float() for x in split(name, named_arrays(model)[name])]
        optimizers[name] = torch.optim.Muon(expected[name], weight_decay=config.weight_decay)
    for step in range(ours.STEPS):
        gradients = ours.gradients(step)
        for name, optimizer in optimizers.items():
            for parameter, g in zip(expected[name], split(name, gradients[name]), strict=True):
                parameter.grad = g.float()
            ratio = config.muon_learning_rate / config.learning_rate
            lr = ours.rate(config, step)
            # Theirs decays by its own rate, ours by Adam's.
            optimizer.param_groups[0]["lr"] = lr * ratio
            optimizer.param_groups[0]["weight_decay"] = config.weight_decay / ratio
            optimizer.step()
    found = ours.trained(config)
    for name, layers in expected.items():
        start = np.asarray(named_arrays(model)[name], np.float64)
        theirs = np.stack([x.double().numpy() for x in layers]) - start
        way = found[name] - start
        assert np.linalg.norm(way - theirs) < 0.02 * np.linalg.norm(theirs), name
