"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from dataclasses import replace

from gptkern.model.families import llama
from gptkern.model.families.table import Family, Fields
from gptkern.model.spec import DecoderSpec


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that a Mistral's ``config.json`` describes; ``sliding_window`` null is none."""
    found = llama.spec(fields)
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window")
    return found.replace(layers=tuple(replace(layer, window=window) for layer in found.layers))


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    spec,
    llama.TENSORS,
    llama.DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
