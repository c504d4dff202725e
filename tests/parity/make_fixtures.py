"""Makes tests/fixtures: a tiny model of each family by transformers, and what it computes.

python tests/parity/make_fixtures.py, with torch and transformers installed.
"""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import oracle
import torch
import transformers
from cases import hf_config
from safetensors.numpy import save_file

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CASES = {
    "gpt2": "exact gelu, narrow mlp",
    "gpt_neo": "global and local, untied",
    "gptj": "a part of each head",
    "gpt_neox": "a part of each head",
    "opt": "as published",
    "llama": "scaled as llama 3.1",
    "mistral": "window",
    "qwen2": "windows in the later layers",
    "qwen3": "grouped, tied",
    "gemma": "one key-value head",
    "gemma2": "window",
    "gemma3_text": "scaled, given types",
    "phi": "grouped, normalised",
    "olmo": "clipped",
    "olmo2": "grouped, tied",
    "smollm3": "given layers, untied",
    "starcoder2": "window",
}


def make(model_type: str) -> None:
    directory = FIXTURES / model_type
    shutil.rmtree(directory, ignore_errors=True)
    # Few bytes in the repository: numbers that bfloat16 holds.
    model = oracle.random_model(hf_config(model_type, CASES[model_type])).to(torch.bfloat16)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    # Loaded again, since a cast would have rounded the tables of rope as well.
    again = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    save_file(expected(again.eval()), directory / "expected.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def expected(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Tokens, their logits, and their greedy continuation; in float64, for in float32 they differ
    between processors by several roundings."""
    model = copy.deepcopy(model).double()
    tokens = torch.from_numpy(oracle.tokens_of(13, model.config.vocab_size))
    with torch.no_grad():
        logits = model(tokens).logits.float().numpy()
    continued = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=16
    )
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits,
        "continued": continued.numpy().astype(np.int32),
    }


if __name__ == "__main__":
    for name in CASES:
        make(name)
