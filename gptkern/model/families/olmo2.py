"""OLMo 2: Llama whose norms follow the branches, and norm all queries and all keys of a token at once."""

from __future__ import annotations

from gptkern.model.families import llama
from gptkern.model.families.table import Family, Fields, rows
from gptkern.model.spec import DecoderSpec

_NORMS = ("h.{}.ln_1.weight", "h.{}.ln_2.weight")
_TENSORS = (
    *(row for row in llama.TENSORS if row.ours not in _NORMS),
    *rows(
        ("ln_1", "post_attention_layernorm"),
        ("ln_2", "post_feedforward_layernorm"),
        ("attn.q_norm", "self_attn.q_norm"),
        ("attn.k_norm", "self_attn.k_norm"),
        layer=llama.LAYER,
    ),
)


def spec(fields: Fields) -> DecoderSpec:
    """The decoder that an OLMo-2's ``config.json`` describes."""
    return llama.spec(fields).replace(norm_place="branch", qk_norm="whole")


OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    spec,
    _TENSORS,
    llama.DEFAULTS
    | {
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": 50279,
    },
)
