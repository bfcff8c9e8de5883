"""GPT-J: parallel branches with one norm, rotary positions of neighbouring elements, a head with a bias."""

from __future__ import annotations

from gptkern.model.families.table import Family, Fields, rows
from gptkern.model.spec import DecoderSpec, LayerSpec, NormSpec, RotarySpec

_BOTH = ("weight", "bias")
_LAYER = "transformer.h.{}."
_TENSORS = (
    *rows(("wte", "transformer.wte")),
    *rows(("ln_f", "transformer.ln_f"), ("lm_head", "lm_head"), suffixes=_BOTH),
    *rows(
        ("attn.c_attn", "attn.q_proj", "attn.k_proj", "attn.v_proj"),
        ("attn.c_proj", "attn.out_proj"),
        layer=_LAYER,
    ),
    *rows(
        ("ln_1", "ln_1"),
        ("mlp.c_fc", "mlp.fc_in"),
        ("mlp.c_proj", "mlp.fc_out"),
        layer=_LAYER,
        suffixes=_BOTH,
    ),
)


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that a GPT-J's ``config.json`` describes."""
    width, heads = fields.integer("n_embd"), fields.integer("n_head")
    head_dim = fields.head_dim(width, heads)
    rotary = RotarySpec(fields.rotated(head_dim, fields.integer("rotary_dim")), 10000.0, "interleaved")
    return DecoderSpec(
        vocab_size=fields.integer("vocab_size"),
        context=fields.context("n_positions"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        inner=fields.integer("n_inner", 4 * width),
        layers=(LayerSpec(head_dim**-0.5, rotary=rotary),) * fields.integer("n_layer"),
        norm=NormSpec("layer", fields.number("layer_norm_epsilon", above=0.0), bias=True),
        activation=fields.activation("activation_function"),
        fc_bias=True,
        proj_bias=True,
        head_bias=True,
        parallel=True,
        shared_norm=True,
        tied=fields.switch("tie_word_embeddings"),
        embedding_dropout=fields.probability("embd_pdrop"),
        residual_dropout=fields.probability("resid_pdrop"),
        attention_dropout=fields.probability("attn_pdrop"),
    )


GPTJ = Family(
    "gptj",
    "GPTJForCausalLM",
    spec,
    _TENSORS,
    {
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": False,
    },
)
