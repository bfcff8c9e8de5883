"""Granite 3: Llama with factors on embeddings, scores, branches and logits."""

from __future__ import annotations

from dataclasses import replace

from gptkern.model.families import llama
from gptkern.model.families.table import Family, Fields
from gptkern.model.spec import DecoderSpec


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that a Granite's ``config.json`` describes."""
    found, scale = llama.spec(fields), fields.number("attention_multiplier", above=0.0)
    return found.replace(
        layers=tuple(replace(layer, attention_scale=scale) for layer in found.layers),
        embedding_scale=fields.number("embedding_multiplier", above=0.0),
        residual_scale=fields.number("residual_multiplier", above=0.0),
        logits_scale=1.0 / fields.number("logits_scaling", above=0.0),
    )


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    spec,
    llama.TENSORS,
    llama.DEFAULTS
    | {
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
)
