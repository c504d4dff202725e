"""GPT-2 (Radford et al. 2019). It is what GPTConfig is by default."""

from eqx_gpt.config import GPTConfig
from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.rules import KeyMap, Rule, linear


def key_map(config: GPTConfig) -> KeyMap:
    """GPT-2's linear maps lie as (in, out); its fused q, k, v lie in our order."""
    layer = "transformer.h.{layer}."
    return KeyMap(
        rules=(
            Rule("wpe.weight", ("transformer.wpe.weight",)),
            *linear("blocks.norm1", layer + "ln_1", bias=True),
            *linear("blocks.attention.qkv", layer + "attn.c_attn", bias=True, op="transpose"),
            *linear("blocks.attention.out", layer + "attn.c_proj", bias=True, op="transpose"),
            *linear("blocks.norm2", layer + "ln_2", bias=True),
            *linear("blocks.mlp.up", layer + "mlp.c_fc", bias=True, op="transpose"),
            *linear("blocks.mlp.down", layer + "mlp.c_proj", bias=True, op="transpose"),
            *linear("norm", "transformer.ln_f", bias=True),
        ),
        embedding="transformer.wte.weight",
        prefix="transformer.",
        ignored=(layer + "attn.bias", layer + "attn.masked_bias"),  # causal masks of old files
    )


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    base={},
    fields={
        "vocab_size": Field(50257, ("vocab_size",)),
        "n_positions": Field(1024, ("block_size",)),
        "n_embd": Field(768, ("n_embd",)),
        "n_layer": Field(12, ("n_layer",)),
        "n_head": Field(12, ("n_head",)),
        "n_inner": Field(None, ("mlp.n_inner",)),
        "activation_function": Field("gelu_new", ("mlp.activation",), ACTIVATIONS),
        "layer_norm_epsilon": Field(1e-5, ("norm.eps",)),
        "tie_word_embeddings": Field(True, ("head",), HEAD),
    },
    aliases={"n_ctx": "n_positions"},
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    dropout=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    ignored=frozenset(
        {
            "reorder_and_upcast_attn",  # our softmax is float32 anyway
            "n_special",
            "predict_special_tokens",
            "summary_activation",  # and what follows: of other heads than the language model's
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
    key_map=key_map,
)
