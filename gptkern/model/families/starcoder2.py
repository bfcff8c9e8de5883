"""StarCoder 2: layer norms, grouped heads, rotary positions, a sliding window, MLPs without a gate."""

from __future__ import annotations

from gptkern.model.families.llama import LAYER
from gptkern.model.families.table import Family, Fields, rows
from gptkern.model.spec import DecoderSpec, LayerSpec, NormSpec

_BOTH = ("weight", "bias")
_TENSORS = (
    *rows(("wte", "model.embed_tokens"), ("lm_head", "lm_head")),
    *rows(("ln_f", "model.norm"), suffixes=_BOTH),
    *rows(
        ("ln_1", "input_layernorm"),
        ("ln_2", "post_attention_layernorm"),
        ("attn.c_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("attn.c_proj", "self_attn.o_proj"),
        ("mlp.c_fc", "mlp.c_fc"),
        ("mlp.c_proj", "mlp.c_proj"),
        layer=LAYER,
        suffixes=_BOTH,
    ),
)


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that a StarCoder 2's ``config.json`` describes; ``sliding_window`` null is none."""
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads, head_dim = fields.kv_heads(heads), fields.head_dim(width, heads)
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    layer = LayerSpec(head_dim**-0.5, window=window, rotary=fields.rotary(head_dim))
    bias = fields.switch("use_bias", True)
    return DecoderSpec(
        vocab_size=fields.integer("vocab_size"),
        context=fields.context(),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=fields.integer("intermediate_size"),
        layers=(layer,) * fields.layers(),
        norm=NormSpec("layer", fields.number("norm_epsilon", above=0.0), bias=True),
        activation=fields.activation("hidden_act"),
        qkv_bias=bias,
        out_bias=bias,
        fc_bias=bias,
        proj_bias=bias,
        tied=fields.switch("tie_word_embeddings", True),
        embedding_dropout=fields.probability("embedding_dropout"),
        residual_dropout=fields.probability("residual_dropout"),
        attention_dropout=fields.probability("attention_dropout"),
    )


STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    spec,
    _TENSORS,
    {
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": True,
    },
)
