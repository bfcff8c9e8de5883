"""Llama and SmolLM: RMS norms, grouped heads, rotary positions (SmolLM3: in some layers), gated MLPs."""

from __future__ import annotations

from typing import Any

from gptkern.model.families.table import Family, Fields, rows
from gptkern.model.spec import DecoderSpec, LayerSpec, NormSpec

LAYER = "model.layers.{}."
TENSORS = (
    *rows(("wte", "model.embed_tokens"), ("ln_f", "model.norm"), ("lm_head", "lm_head")),
    *rows(("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm"), layer=LAYER),
    *rows(
        ("attn.c_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("attn.c_proj", "self_attn.o_proj"),
        ("mlp.c_fc", "mlp.gate_proj", "mlp.up_proj"),
        ("mlp.c_proj", "mlp.down_proj"),
        layer=LAYER,
        suffixes=("weight", "bias"),
    ),
)
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def spec(fields: Fields, activation: str = "hidden_act", **rotary: Any) -> DecoderSpec:
    """The decoder that a Llama's ``config.json`` describes.

    Args:
        activation: The field of the MLP's activation.
        rotary: The options of ``Fields.rotary``.
    """
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads, head_dim = fields.kv_heads(heads), fields.head_dim(width, heads)
    layer = LayerSpec(head_dim**-0.5, rotary=fields.rotary(head_dim, **rotary))
    bias, mlp_bias = fields.switch("attention_bias"), fields.switch("mlp_bias")
    return DecoderSpec(
        vocab_size=fields.integer("vocab_size"),
        context=fields.context(),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=fields.integer("intermediate_size"),
        layers=(layer,) * fields.layers(),
        norm=NormSpec("rms", fields.number("rms_norm_eps", above=0.0)),
        activation=fields.activation(activation),
        gated=True,
        qkv_bias=bias,
        out_bias=bias,
        fc_bias=mlp_bias,
        proj_bias=mlp_bias,
        tied=fields.switch("tie_word_embeddings"),
        attention_dropout=fields.probability("attention_dropout"),
    )


def smollm3_spec(fields: Fields) -> DecoderSpec:
    """Llama's, with layers that do not rotate (every fourth unless the list says which) and windows."""
    found = spec(fields)
    count, head_dim = len(found.layers), found.head_dim
    rotary = fields.rotary(head_dim, 2000000.0)
    interval = fields.integer("no_rope_layer_interval", 4)
    rotated = fields.per_layer("no_rope_layers", count, (0, 1), None)
    if fields.get("no_rope_layers") is None:
        rotated = [int((layer + 1) % interval != 0) for layer in range(count)]
    window = fields.integer("sliding_window") if fields.switch("use_sliding_window") else None
    default = "full_attention"
    kinds = fields.per_layer("layer_types", count, ("full_attention", "sliding_attention"), default)
    if fields.get("layer_types") is None and window is not None:
        kinds = [default if turns else "sliding_attention" for turns in rotated]
    return found.replace(
        layers=tuple(
            LayerSpec(
                head_dim**-0.5,
                window=window if kind == "sliding_attention" else None,
                rotary=rotary if turns else None,
            )
            for kind, turns in zip(kinds, rotated, strict=True)
        )
    )


LLAMA = Family("llama", "LlamaForCausalLM", spec, TENSORS, DEFAULTS)
SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    smollm3_spec,
    TENSORS,
    DEFAULTS
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "pad_token_id": 128004,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
    },
)
