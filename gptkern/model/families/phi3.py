"""Phi 3 and 4: Llama whose checkpoints keep queries, keys and values, and gate and up, in one matrix each."""

from __future__ import annotations

from gptkern.model.families import llama, mistral
from gptkern.model.families.table import Family, Fields, rows
from gptkern.model.spec import DecoderSpec

_TENSORS = (
    *rows(("wte", "model.embed_tokens"), ("ln_f", "model.norm"), ("lm_head", "lm_head")),
    *rows(
        ("ln_1", "input_layernorm"),
        ("ln_2", "post_attention_layernorm"),
        ("attn.c_attn", "self_attn.qkv_proj"),
        ("attn.c_proj", "self_attn.o_proj"),
        ("mlp.c_fc", "mlp.gate_up_proj"),
        ("mlp.c_proj", "mlp.down_proj"),
        layer=llama.LAYER,
    ),
)


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that a Phi-3's ``config.json`` describes."""
    return mistral.spec(fields, fraction=1.0).replace(residual_dropout=fields.probability("resid_pdrop"))


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    spec,
    _TENSORS,
    llama.DEFAULTS
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
)
