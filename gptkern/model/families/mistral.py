"""Mistral: Llama with a sliding window; Ministral has it in the layers that ``layer_types`` names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gptkern.model.families import llama
from gptkern.model.families.table import Family, Fields
from gptkern.model.spec import DecoderSpec


def spec(fields: Fields, **rotary: Any) -> DecoderSpec:
    """Llama with a window in all layers; ``sliding_window`` null is none.

    Args:
        rotary: The options of ``Fields.rotary``.
    """
    found = llama.spec(fields, **rotary)
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    return found.replace(layers=tuple(replace(layer, window=window) for layer in found.layers))


def _mistral_spec(fields: Fields) -> DecoderSpec:
    """The decoder that a Mistral's ``config.json`` describes."""
    found, sliding = spec(fields), "sliding_attention"
    kinds = fields.per_layer("layer_types", len(found.layers), ("full_attention", sliding), sliding)
    return found.replace(
        layers=tuple(
            layer if kind == sliding else replace(layer, window=None)
            for layer, kind in zip(found.layers, kinds, strict=True)
        )
    )


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _mistral_spec,
    llama.TENSORS,
    llama.DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
