"""Names that transformers' ``generate`` takes and gptkern's does not: what to write instead."""

from __future__ import annotations

_LOGPROBS = (
    "output_logprobs=True gives the log-probability of each token, top_logprobs=N the N most likely tokens"
)
_LOOKUP = "speculate=N drafts N tokens from repeated text"
# None: nothing in gptkern's own generate is like it.
INSTEAD: dict[str, str | None] = {
    **dict.fromkeys(("output_scores", "output_logits"), _LOGPROBS),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_model"), _LOOKUP),
    **dict.fromkeys(
        ("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "prefix_allowed_tokens_fn"),
        "a logits_processor can bar every other token",
    ),
    "generation_config": "its fields are options here, and a model's defaults are model.generation_config",
    "inputs": "the prompt is input_ids",
    "use_cache": "keys and values are always kept",
    "prefill_chunk_size": "gptkern.Engine(prefill_chunk=N) has it",
    "max_time": "a stopping_criteria can look at the clock",
    **dict.fromkeys(
        (
            "assistant_confidence_threshold",
            "assistant_early_exit",
            "assistant_ensemble_weight",
            "assistant_lookbehind",
            "bos_token_id",
            "cache_config",
            "cache_implementation",
            "compile_config",
            "constraints",
            "continuous_batching_config",
            "custom_generate",
            "decoder_start_token_id",
            "disable_compile",
            "diversity_penalty",
            "dola_layers",
            "encoder_no_repeat_ngram_size",
            "encoder_repetition_penalty",
            "exponential_decay_length_penalty",
            "force_words_ids",
            "guidance_scale",
            "is_assistant",
            "low_memory",
            "max_cache_len",
            "negative_prompt_attention_mask",
            "negative_prompt_ids",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "num_beam_groups",
            "output_attentions",
            "output_hidden_states",
            "penalty_alpha",
            "remove_invalid_values",
            "renormalize_logits",
            "speculation_type",
            "synced_gpus",
            "target_lookbehind",
            "token_healing",
            "top_h",
            "use_mtp",
            "watermarking_config",
        )
    ),
}


def answer(name: str) -> str | None:
    """The error for a name of transformers; None for any other name."""
    if name not in INSTEAD:
        return None
    instead = f"{INSTEAD[name]}; " if INSTEAD[name] else ""
    return (
        f"generate: {name!r} is an option of transformers that gptkern's own generate does not have: "
        f"{instead}gptkern.accelerate keeps transformers' generate, which takes it"
    )
