"""GPT-BigCode (SantaCoder, StarCoder): GPT-2 with one key and value head; matrices are ``(out, in)``."""

from __future__ import annotations

from gptkern.model.families.table import Family, Fields, rows
from gptkern.model.spec import DecoderSpec, LayerSpec, NormSpec

_BOTH = ("weight", "bias")
_NAMES = ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_TENSORS = (
    *rows(("wte", "transformer.wte"), ("wpe", "transformer.wpe"), ("lm_head", "lm_head")),
    *rows(("ln_f", "transformer.ln_f"), suffixes=_BOTH),
    *rows(*((name, name) for name in _NAMES), layer="transformer.h.{}.", suffixes=_BOTH),
)


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that a GPT-BigCode's ``config.json`` describes."""
    width, heads = fields.integer("n_embd"), fields.integer("n_head")
    # Without it queries, keys and values are stored head by head.
    fields.fixed("multi_query", True)
    head_dim = fields.head_dim(width, heads)
    scale = head_dim**-0.5 if fields.switch("scale_attn_weights", True) else 1.0
    return DecoderSpec(
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("n_positions"),
        width=width,
        heads=heads,
        kv_heads=1,
        head_dim=head_dim,
        inner=fields.integer("n_inner", 4 * width),
        layers=(LayerSpec(scale),) * fields.integer("n_layer"),
        norm=NormSpec("layer", fields.number("layer_norm_epsilon", above=0.0), bias=True),
        activation=fields.activation("activation_function"),
        qkv_bias=True,
        out_bias=True,
        fc_bias=True,
        proj_bias=True,
        learned_positions=True,
        tied=fields.switch("tie_word_embeddings", True),
        embedding_dropout=fields.probability("embd_pdrop"),
        residual_dropout=fields.probability("resid_pdrop"),
        attention_dropout=fields.probability("attn_pdrop"),
    )


GPT_BIGCODE = Family(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    spec,
    _TENSORS,
    {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_pytorch_tanh",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": True,
    },
    scaled_init=True,
)
