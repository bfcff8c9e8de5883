"""GPT-NeoX and Pythia: parallel branches with a norm each, rotary positions in a part of each head."""

from __future__ import annotations

from gptkern.model.families.table import Family, Fields, Tensor, rows
from gptkern.model.spec import DecoderSpec, LayerSpec, NormSpec

_LAYER = "gpt_neox.layers.{}."
_BOTH = ("weight", "bias")
_TENSORS = (
    *rows(("wte", "gpt_neox.embed_in"), ("lm_head", "embed_out")),
    *rows(("ln_f", "gpt_neox.final_layer_norm"), suffixes=_BOTH),
    *(
        Tensor(
            f"h.{{}}.attn.c_attn.{suffix}", (f"{_LAYER}attention.query_key_value.{suffix}",), per_head=True
        )
        for suffix in _BOTH
    ),
    *rows(
        ("ln_1", "input_layernorm"),
        ("ln_2", "post_attention_layernorm"),
        ("attn.c_proj", "attention.dense"),
        ("mlp.c_fc", "mlp.dense_h_to_4h"),
        ("mlp.c_proj", "mlp.dense_4h_to_h"),
        layer=_LAYER,
        suffixes=_BOTH,
    ),
)


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that a GPT-NeoX's ``config.json`` describes."""
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim, bias = fields.head_dim(width, heads), fields.switch("attention_bias", True)
    dropout = fields.probability("hidden_dropout")
    if fields.get("rope_parameters") is None and fields.get("partial_rotary_factor") is not None:
        raise fields.refuse("partial_rotary_factor", "the share of a head that is rotated is rotary_pct")
    rotary = fields.rotary(
        head_dim,
        fields.number("rotary_emb_base", 10000.0, above=0.0),
        fraction=fields.number("rotary_pct", 0.25, above=0.0),
    )
    return DecoderSpec(
        vocab_size=fields.integer("vocab_size"),
        context=fields.context(),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        inner=fields.integer("intermediate_size"),
        layers=(LayerSpec(head_dim**-0.5, rotary=rotary),) * fields.integer("num_hidden_layers"),
        norm=NormSpec("layer", fields.number("layer_norm_eps", above=0.0), bias=True),
        activation=fields.activation("hidden_act"),
        qkv_bias=bias,
        out_bias=bias,
        fc_bias=True,
        proj_bias=True,
        parallel=fields.switch("use_parallel_residual", True),
        tied=fields.switch("tie_word_embeddings"),
        embedding_dropout=dropout,
        residual_dropout=dropout,
        attention_dropout=fields.probability("attention_dropout"),
    )


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    spec,
    _TENSORS,
    {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
)
