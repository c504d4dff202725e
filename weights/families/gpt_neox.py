"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia (Biderman et al. 2023,
arXiv:2304.01373): attention and mlp side by side, a quarter of each head turns."""

from eqx_gpt.config import GPTConfig
from weights.family import ACTIVATIONS, HEAD, Family, Field
from weights.groups import rope
from weights.rules import KeyMap, linear


def key_map(config: GPTConfig) -> KeyMap:
    layer, bias = "gpt_neox.layers.{layer}.", config.attention.qkv_bias
    fused, heads = layer + "attention.query_key_value", (3, config.n_head)
    return KeyMap(
        rules=(
            *linear("blocks.norm1", layer + "input_layernorm", bias=True),
            *linear("blocks.attention.qkv", fused, bias=bias, op="interleave", rows=heads),
            *linear("blocks.attention.out", layer + "attention.dense", bias=bias),
            *linear("blocks.norm2", layer + "post_attention_layernorm", bias=True),
            *linear("blocks.mlp.up", layer + "mlp.dense_h_to_4h", bias=True),
            *linear("blocks.mlp.down", layer + "mlp.dense_4h_to_h", bias=True),
            *linear("norm", "gpt_neox.final_layer_norm", bias=True),
        ),
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        prefix="gpt_neox.",
        ignored=(  # causal masks and a table, in old files
            layer + "attention.bias",
            layer + "attention.masked_bias",
            layer + "attention.rotary_emb.inv_freq",
        ),
    )


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    base={"position.kind": "rope"},
    fields={
        "vocab_size": Field(50432, ("vocab_size",)),
        "max_position_embeddings": Field(2048, ("block_size",)),
        "hidden_size": Field(6144, ("n_embd",)),
        "intermediate_size": Field(24576, ("mlp.n_inner",)),
        "num_hidden_layers": Field(44, ("n_layer",)),
        "num_attention_heads": Field(64, ("n_head",)),
        "hidden_act": Field("gelu", ("mlp.activation",), ACTIVATIONS),
        "layer_norm_eps": Field(1e-5, ("norm.eps",)),
        "use_parallel_residual": Field(True, ("residual",), {True: "parallel", False: "pre_norm"}),
        "attention_bias": Field(True, ("attention.qkv_bias", "attention.out_bias")),
        "tie_word_embeddings": Field(False, ("head",), HEAD),
    },
    groups=(rope(share=0.25, old=("rotary_emb_base", "rotary_pct")),),
    dropout=("attention_dropout", "hidden_dropout"),
    ignored=frozenset(
        {"attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"}
    ),
    key_map=key_map,
)
