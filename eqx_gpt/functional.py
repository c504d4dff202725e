"""GPT-2 on one page: pure functions over the arrays of its safetensors file.

For reading, for inference, and as an independent check of the module `eqx_gpt.gpt.GPT`. The
model is a dict, `p`, of arrays under the names of the file, less the leading `transformer.`; one
part of it is `sub(p, "h.0.mlp.")`. A sequence is an array `x` of shape (seq, d_model).

    python -c 'from eqx_gpt.functional import main; print(main("Alan Turing"))'
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from eqx_gpt.tokenizer import GPT2Tokenizer

Params = Mapping[str, jax.Array]

HUB_IDS = {
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
THIS_PAGE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def sub(p: Params, prefix: str) -> dict[str, jax.Array]:
    return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}


def linear(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["weight"] + p["bias"][None, :]


def layer_norm(p: Params, x: jax.Array, eps: float = 1e-5) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)
    return x * p["weight"][None, :] + p["bias"][None, :]


def gelu(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(p: Params, x: jax.Array, n_head: int) -> jax.Array:
    seq, d_model = x.shape
    heads = linear(sub(p, "c_attn."), x).reshape(seq, 3, n_head, d_model // n_head)
    q, k, v = heads[:, 0], heads[:, 1], heads[:, 2]  # (seq, n_head, head_dim)
    scores = jnp.einsum("qhd,khd->hqk", q, k) / math.sqrt(d_model // n_head)
    past = jnp.tril(jnp.ones((1, seq, seq), bool))
    weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("hqk,khd->qhd", weights, v)
    return linear(sub(p, "c_proj."), mixed.reshape(seq, d_model))


def mlp(p: Params, x: jax.Array) -> jax.Array:
    return linear(sub(p, "c_proj."), gelu(linear(sub(p, "c_fc."), x)))


def block(p: Params, x: jax.Array, n_head: int) -> jax.Array:
    x = x + attention(sub(p, "attn."), layer_norm(sub(p, "ln_1."), x), n_head)
    return x + mlp(sub(p, "mlp."), layer_norm(sub(p, "ln_2."), x))


def gpt2_hidden(p: Params, tokens: jax.Array, n_head: int) -> jax.Array:
    """Tokens (seq,) -> what the head multiplies, (seq, d_model)."""
    x = p["wte.weight"][tokens] + p["wpe.weight"][: tokens.shape[0]]
    n_layer = sum(name.endswith("ln_1.weight") for name in p)
    for i in range(n_layer):
        x = block(sub(p, f"h.{i}."), x, n_head)
    return layer_norm(sub(p, "ln_f."), x)


def gpt2(p: Params, tokens: jax.Array, n_head: int) -> jax.Array:
    """Tokens (seq,) -> logits of the next token at every position, (seq, vocab)."""
    return gpt2_hidden(p, tokens, n_head) @ p["wte.weight"].T


@partial(jax.jit, static_argnames=("n_head", "top_k"))
def sample(
    p: Params,
    window: jax.Array,
    n_known: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    *,
    n_head: int,
    top_k: int | None,
) -> jax.Array:
    """The token after the first `n_known` of a window; what follows them cannot change it."""
    logits = p["wte.weight"] @ gpt2_hidden(p, window, n_head)[n_known - 1]
    if top_k is not None and top_k < logits.shape[0]:
        least = jax.lax.top_k(logits, top_k)[0][-1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature == 0, jnp.argmax(logits), drawn)


def generate(
    p: Params,
    tokens: list[int],
    n_new: int,
    n_head: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 40,
    seed: int = 0,
) -> list[int]:
    """The new tokens alone. One window size for all steps, so that one program serves them."""
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}")
    tokens, n_prompt = list(tokens), len(tokens)
    size = min(p["wpe.weight"].shape[0], n_prompt + n_new)
    for i in range(n_new):
        known = tokens[-size:]
        window = jnp.asarray(known + [0] * (size - len(known)), jnp.int32)
        n_known, heat = jnp.asarray(len(known), jnp.int32), jnp.asarray(temperature, jnp.float32)
        key = jax.random.fold_in(jax.random.key(seed), i)
        token = sample(p, window, n_known, key, heat, n_head=n_head, top_k=top_k)
        tokens.append(int(token))
    return tokens[n_prompt:]


def load(model_size: str, model_dir: str | Path | None = None) -> tuple[Params, int]:
    """The arrays, in float32, and the number of heads. ValueError if it is no GPT-2."""
    from safetensors import SafetensorError, safe_open

    if model_dir is None and model_size not in HUB_IDS:
        raise ValueError(f"model_size is {model_size!r}, expected one of {', '.join(HUB_IDS)}")
    config = json.loads(_file("config.json", model_size, model_dir).read_text("utf-8"))
    for name, value in THIS_PAGE.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}, this page computes {value!r}")
    path = _file("model.safetensors", model_size, model_dir)
    try:
        with safe_open(path, framework="np") as file:
            names = {name: name.removeprefix("transformer.") for name in file.keys()}  # noqa: SIM118
            p = {names[n]: jnp.asarray(file.get_tensor(n), jnp.float32) for n in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from error
    return p, config["n_head"]


def _file(name: str, model_size: str, model_dir: str | Path | None) -> Path:
    if model_dir is not None:
        path = Path(model_dir) / name
        if not path.is_file():
            raise ValueError(f"{path} does not exist; model_dir must hold {name}")
        return path
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(HUB_IDS[model_size], name))
    except OSError as error:
        message = f"{HUB_IDS[model_size]}: {name} could not be fetched ({error}); give model_dir"
        raise ValueError(message) from error


def main(
    prompt: str,
    n_tokens_to_generate: int = 50,
    model_size: str = "124M",
    temperature: float = 0.8,
    top_k: int | None = 40,
    model_dir: str | Path | None = None,
    seed: int = 0,
) -> str:
    """The continuation of a prompt by GPT-2, without the prompt. `temperature` 0 is greedy.

    The model is fetched from the hub by its size, 124M, 355M, 774M or 1558M, or read from
    `model_dir`, which holds config.json and model.safetensors. ValueError if there is none.
    """
    tokenizer = GPT2Tokenizer()
    tokens = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    p, n_head = load(model_size, model_dir)
    settings = {"temperature": temperature, "top_k": top_k, "seed": seed}
    return tokenizer.decode(generate(p, tokens, n_tokens_to_generate, n_head, **settings))
