"""Gemma 3 (text): norms before and after each branch, of each head too, and windows in five layers of six."""

from __future__ import annotations

from dataclasses import replace

from gptkern.model.families import llama
from gptkern.model.families.table import Family, Fields, rows
from gptkern.model.spec import DecoderSpec, LayerSpec

_FULL, _SLIDING = "full_attention", "sliding_attention"
_TENSORS = (
    *(row for row in llama.TENSORS if row.ours != "h.{}.ln_2.weight"),
    *rows(
        ("post_attn_norm", "post_attention_layernorm"),
        ("ln_2", "pre_feedforward_layernorm"),
        ("post_mlp_norm", "post_feedforward_layernorm"),
        ("attn.q_norm", "self_attn.q_norm"),
        ("attn.k_norm", "self_attn.k_norm"),
        layer=llama.LAYER,
    ),
)


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that a Gemma 3's ``config.json`` describes; of a whole one, its ``text_config``."""
    if fields.get("attn_logit_softcapping") is not None:
        raise fields.refuse("attn_logit_softcapping", "null is needed: Gemma 3's scores have no cap")
    found = llama.spec(fields, activation="hidden_activation", layer_type=_FULL)
    return found.replace(
        layers=_layers(fields, found),
        norm=replace(found.norm, unit_offset=True),
        norm_place="both",
        qk_norm="head",
        embedding_scale=found.width**0.5,
        logits_softcap=fields.optional("final_logit_softcapping"),
    )


def _layers(fields: Fields, spec: DecoderSpec) -> tuple[LayerSpec, ...]:
    scale = fields.number("query_pre_attn_scalar", above=0.0) ** -0.5
    count, head_dim = len(spec.layers), spec.head_dim
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    kinds = fields.per_layer("layer_types", count, (_FULL, _SLIDING), None)
    if fields.get("layer_types") is None:
        kinds = [_SLIDING if (index + 1) % pattern else _FULL for index in range(count)]
    windowed = fields
    if fields.get("rope_parameters") is None:
        # In older files the other fields of rotary positions are those of whole attention.
        windowed = Fields(fields.model_type, {"rope_theta": fields.get("rope_local_base_freq")})
    of_kind = {
        _FULL: LayerSpec(scale, None, fields.rotary(head_dim, 1e6, layer_type=_FULL)),
        _SLIDING: LayerSpec(
            scale, fields.integer("sliding_window"), windowed.rotary(head_dim, 1e4, layer_type=_SLIDING)
        ),
    }
    return tuple(of_kind[kind] for kind in kinds)


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    spec,
    _TENSORS,
    llama.DEFAULTS
    | {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    },
)
