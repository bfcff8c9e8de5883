"""The families of models, by the model type of ``config.json``; one file of tables each.

``gptkern.model.families.table`` says what such a file holds. GPT-2 and the GPT of 2018 have their own
configuration, ``GPTConfig``; all others are read through the registry below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptkern.checkpoint.errors import shown
from gptkern.model.families.gemma3 import GEMMA3
from gptkern.model.families.gpt_bigcode import GPT_BIGCODE
from gptkern.model.families.gpt_neox import GPT_NEOX
from gptkern.model.families.gptj import GPTJ
from gptkern.model.families.granite import GRANITE
from gptkern.model.families.llama import LLAMA, SMOLLM3
from gptkern.model.families.mistral import MISTRAL
from gptkern.model.families.olmo2 import OLMO2
from gptkern.model.families.opt import OPT
from gptkern.model.families.phi3 import PHI3
from gptkern.model.families.qwen import QWEN2, QWEN3
from gptkern.model.families.starcoder2 import STARCODER2
from gptkern.model.families.table import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, SMOLLM3, MISTRAL, QWEN2, QWEN3, PHI3, GRANITE, OLMO2, GEMMA3),
        *(GPT_NEOX, GPTJ, OPT, GPT_BIGCODE, STARCODER2),
    )
}
# Fields that tell of parts which no executor serves, and what they are.
_EXPERTS = "mixtures of experts are not served"
_LINEAR = "linear attention is not served"
_UNSERVED = {
    "num_local_experts": _EXPERTS,
    "num_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "moe_num_experts": _EXPERTS,
    "linear_num_value_heads": _LINEAR,
    "ssm_cfg": "state space layers are not served",
    "state_size": "state space layers are not served",
    "kv_lora_rank": "latent attention is not served",
}
_UNSERVED_TYPES = {
    "gpt_oss": "attention sinks are not served",
    "mamba": "state space layers are not served",
    "rwkv": _LINEAR,
}


def check_served(data: Mapping[str, Any]) -> None:
    """Refuse what has parts that are not served.

    Raises:
        ValueError: The message names the field of ``config.json`` and what it asks for.
    """
    model_type = data.get("model_type")
    if isinstance(model_type, str) and model_type in _UNSERVED_TYPES:
        raise ValueError(f"config: model_type is {model_type!r}: {_UNSERVED_TYPES[model_type]}")
    for name, reason in _UNSERVED.items():
        if data.get(name):
            raise ValueError(f"config: {name} is {shown(data[name])}: {reason}")
    kinds = data.get("layer_types")
    for kind in kinds if isinstance(kinds, list | tuple) else ():
        if kind not in ("full_attention", "sliding_attention"):
            what = _LINEAR if kind == "linear_attention" else "it is not served"
            raise ValueError(f"config: layer_types has {shown(kind)}: {what}")
    check_decoder(data)


def check_decoder(data: Mapping[str, Any]) -> None:
    """Refuse an encoder, and a decoder beside one.

    Raises:
        ValueError: The message names the field of ``config.json``.
    """
    for name in ("add_cross_attention", "is_encoder_decoder"):
        if data.get(name):
            raise ValueError(f"config: {name} is true: decoders without cross-attention are served")
    # transformers lets every token read every other one then, in any model
    for name, decoder in (("is_causal", True), ("use_bidirectional_attention", False)):
        if data.get(name) is not None and data[name] is not decoder:
            raise ValueError(
                f"config: {name} is {shown(data[name])}; {shown(decoder)} is needed, as in decoders"
            )
