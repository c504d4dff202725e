"""Names of published models and their configurations."""

from eqx_gpt.config import GPTConfig, did_you_mean

_ZOO: dict[str, GPTConfig] = {
    # OpenAI 2019, "Language Models are Unsupervised Multitask Learners"
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    # Sanh et al. 2019, arXiv:1910.01108
    "distilgpt2": GPTConfig(n_layer=6, n_head=12, n_embd=768),
}


def list_models() -> list[str]:
    """Names that `get_config` and `weights.from_pretrained` know."""
    return list(_ZOO)


def get_config(name: str) -> GPTConfig:
    """The configuration of a published model. ValueError, with the near names, if unknown."""
    if name not in _ZOO:
        raise ValueError(f"unknown model {name!r}; {did_you_mean(name, _ZOO)}")
    return _ZOO[name]
