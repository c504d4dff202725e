"""Low-rank adapters against PEFT, on tiny random models, in float32."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from oracle import check_logits, no_warning, random_model, tokens_of
from safetensors.numpy import load_file

from eqx_gpt import lora
from weights import from_pretrained, load_adapter, save_adapter

SIZES: dict[str, Any] = {"vocab_size": 53, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": transformers.LlamaConfig(
        **SIZES, hidden_size=24, intermediate_size=37, num_hidden_layers=3, head_dim=4,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=19,
    ),
    "gpt2": transformers.GPT2Config(**SIZES, n_positions=19, n_embd=24, n_layer=3, n_head=3),
    "gpt_neox": transformers.GPTNeoXConfig(
        **SIZES, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=19,
    ),
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),  # q_proj and v_proj
    ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    ("llama", {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": "all-linear", "lora_dropout": 0.5}),
    (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"layers.1.self_attn.k_proj": 2, "up_proj": 7},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    ("gpt2", {"fan_in_fan_out": True}),  # c_attn
    ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    ("gpt_neox", {"target_modules": "all-linear"}),  # q, k and v lie head by head
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_adapters_in_and_out(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's adapter computes the same here, merged or not; written again it is PEFT's."""
    base, theirs, ours = (tmp_path / name for name in ("base", "theirs", "ours"))
    random_model(MODELS[kind]).save_pretrained(base)
    config = peft.LoraConfig(
        r=5, lora_alpha=7, task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    adapted = peft.get_peft_model(_model(base), config).eval()
    for weight in adapted.parameters():  # large enough to matter
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    with warnings.catch_warnings(action="ignore"):  # it looks for the base on the hub
        adapted.save_pretrained(theirs)

    model = load_adapter(from_pretrained(base), theirs)
    check_logits(model, adapted, 17)
    check_logits(lora.merge(model), adapted, 17)
    check_logits(from_pretrained(theirs), adapted, 17)

    save_adapter(model, ours, base=str(base))
    before, after = (load_file(d / "adapter_model.safetensors") for d in (theirs, ours))
    assert before.keys() == after.keys()
    same_scale = "alpha_pattern" not in options
    assert all(np.array_equal(before[k], after[k]) for k in before if same_scale)
    with no_warning():
        again = peft.PeftModel.from_pretrained(_model(base), ours).eval()
    tokens = torch.from_numpy(tokens_of(17, 53))
    with torch.no_grad():
        expected, found = adapted(tokens).logits, again(tokens).logits
        plain = _model(base)(tokens).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (plain - expected).abs().max() > 0.01 * expected.abs().max()


def _model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
