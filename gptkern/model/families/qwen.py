"""Qwen 2 and 3: Llama with biases in QKV (2) or norms of each head (3), and windows in some layers."""

from __future__ import annotations

from dataclasses import replace

from gptkern.model.families import llama
from gptkern.model.families.table import Family, Fields, rows
from gptkern.model.spec import DecoderSpec, LayerSpec


def qwen2_spec(fields: Fields) -> DecoderSpec:
    """The decoder that a Qwen2's ``config.json`` describes."""
    found = llama.spec(fields)
    return found.replace(layers=_windowed(fields, found), qkv_bias=True, out_bias=False)


def qwen3_spec(fields: Fields) -> DecoderSpec:
    """The decoder that a Qwen3's ``config.json`` describes."""
    found = llama.spec(fields)
    return found.replace(layers=_windowed(fields, found), qk_norm="head")


def _windowed(fields: Fields, spec: DecoderSpec) -> tuple[LayerSpec, ...]:
    """Layers with a window where ``layer_types`` says so; left out, from ``max_window_layers`` on."""
    layers, sliding = spec.layers, fields.switch("use_sliding_window")
    full, windowed = "full_attention", "sliding_attention"
    kinds = fields.per_layer("layer_types", len(layers), (full, windowed), full)
    if fields.get("layer_types") is None and sliding:
        first = fields.integer("max_window_layers", 28, least=0)
        kinds = [windowed if index >= first else full for index in range(len(layers))]
    if not sliding:
        if windowed in kinds:
            raise fields.refuse(
                "use_sliding_window", "true is needed where layer_types has sliding_attention"
            )
        return layers
    if fields.get("sliding_window") is None:
        return layers
    window = fields.integer("sliding_window")
    return tuple(
        replace(layer, window=window if kind == windowed else None)
        for layer, kind in zip(layers, kinds, strict=True)
    )


_DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", qwen2_spec, llama.TENSORS, _DEFAULTS)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    qwen3_spec,
    (
        *llama.TENSORS,
        *rows(("attn.q_norm", "self_attn.q_norm"), ("attn.k_norm", "self_attn.k_norm"), layer=llama.LAYER),
    ),
    _DEFAULTS | {"head_dim": 128},
)
