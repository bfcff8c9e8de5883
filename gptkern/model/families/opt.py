"""OPT: GPT-2 with ReLU, and position embeddings that begin at their third row."""

from __future__ import annotations

from gptkern.model.families.table import Family, Fields, rows
from gptkern.model.spec import DecoderSpec, LayerSpec, NormSpec

_BOTH = ("weight", "bias")
_BODY = "model.decoder."
_TENSORS = (
    *rows(("wte", f"{_BODY}embed_tokens"), ("wpe", f"{_BODY}embed_positions"), ("lm_head", "lm_head")),
    *rows(("ln_f", f"{_BODY}final_layer_norm"), suffixes=_BOTH),
    *rows(
        ("ln_1", "self_attn_layer_norm"),
        ("ln_2", "final_layer_norm"),
        ("attn.c_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("attn.c_proj", "self_attn.out_proj"),
        ("mlp.c_fc", "fc1"),
        ("mlp.c_proj", "fc2"),
        layer=f"{_BODY}layers.{{}}.",
        suffixes=_BOTH,
    ),
)


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that an OPT's ``config.json`` describes; the one of 350M is refused."""
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.fixed("do_layer_norm_before", True)
    fields.fixed("_remove_final_layer_norm", False)
    fields.fixed("layer_norm_elementwise_affine", True)
    fields.fixed("word_embed_proj_dim", width)
    head_dim, bias = fields.head_dim(width, heads), fields.switch("enable_bias", True)
    return DecoderSpec(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("max_position_embeddings"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        inner=fields.integer("ffn_dim"),
        layers=(LayerSpec(head_dim**-0.5),) * fields.integer("num_hidden_layers"),
        norm=NormSpec("layer", 1e-5, bias=True),
        activation=fields.activation("activation_function"),
        qkv_bias=bias,
        out_bias=bias,
        fc_bias=bias,
        proj_bias=bias,
        learned_positions=True,
        position_offset=2,
        tied=fields.switch("tie_word_embeddings", True),
        residual_dropout=fields.probability("dropout"),
        attention_dropout=fields.probability("attention_dropout"),
    )


OPT = Family(
    "opt",
    "OPTForCausalLM",
    spec,
    _TENSORS,
    {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "dropout": 0.1,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "initializer_range": 0.02,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
)
