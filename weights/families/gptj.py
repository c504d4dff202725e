"""GPT-J (Wang and Komatsuzaki 2021): both branches after one norm, neighbours turn together."""

from eqx_gpt.config import GPTConfig
from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.layout import separate_qkv
from weights.rules import KeyMap, Rule, linear


def key_map(config: GPTConfig) -> KeyMap:
    layer = "transformer.h.{layer}."
    return KeyMap(
        rules=(
            *linear("blocks.norm1", layer + "ln_1", bias=True),
            *separate_qkv(config, *(f"{layer}attn.{x}_proj" for x in "qkv")),
            *linear("blocks.attention.out", layer + "attn.out_proj", bias=False),
            *linear("blocks.mlp.up", layer + "mlp.fc_in", bias=True),
            *linear("blocks.mlp.down", layer + "mlp.fc_out", bias=True),
            *linear("norm", "transformer.ln_f", bias=True),
            Rule("head.bias", ("lm_head.bias",)),
        ),
        embedding="transformer.wte.weight",
        prefix="transformer.",
        ignored=(layer + "attn.bias", layer + "attn.masked_bias"),  # causal masks of old files
    )


GPTJ = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    base={
        "residual": "parallel_shared_norm",
        "position.kind": "rope",
        "position.rope_pairs": "neighbours",
        "attention.qkv_bias": False,
        "attention.out_bias": False,
        "head_bias": True,
    },
    fields={
        "vocab_size": Field(50400, ("vocab_size",)),
        "n_positions": Field(2048, ("block_size",)),
        "n_embd": Field(4096, ("n_embd",)),
        "n_layer": Field(28, ("n_layer",)),
        "n_head": Field(16, ("n_head",)),
        "n_inner": Field(None, ("mlp.n_inner",)),
        "rotary_dim": Field(64, ("position.rope_dim",), null="none"),
        "activation_function": Field("gelu_new", ("mlp.activation",), ACTIVATIONS),
        "layer_norm_epsilon": Field(1e-5, ("norm.eps",)),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    aliases={"n_ctx": "n_positions"},
    fixed={"rotary": True, "scale_attn_weights": True},
    dropout=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    ignored=frozenset(  # of other heads than the language model's
        {
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
    key_map=key_map,
)
