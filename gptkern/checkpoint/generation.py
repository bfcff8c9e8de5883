"""The defaults of ``generate`` that a checkpoint brings: transformers' ``generation_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptkern.config import Config

# What gptkern's generate has an option for.
FIELDS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "sequence_bias",
    "num_return_sequences",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
)
# What else would change the tokens, and the values by which it does not.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "token_healing": (False,),
    "top_h": (),
    "watermarking_config": (),
}


def of_config(config: Config) -> dict[str, Any]:
    """The defaults of a model that came without any: its special tokens."""
    eos = list(config.eos_token_ids)
    return {"bos_token_id": config.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}


def of_json(data: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Generation defaults from ``config.json``, where older checkpoints keep such fields."""
    found = of_config(config)
    return found | {
        name: data[name]
        for name in (*FIELDS, *UNSUPPORTED)
        if name not in found and data.get(name) is not None
    }
