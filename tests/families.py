"""Small random configurations of transformers' families, four or more each."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma3TextConfig,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

VOCAB, CONTEXT = 67, 128
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_TINY: dict[str, Any] = {
    **_SHARED,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": CONTEXT,
}
_SMALL: dict[str, Any] = {**_SHARED, "n_positions": CONTEXT, "n_embd": 48, "n_layer": 3, "n_head": 4}
_ODD: dict[str, Any] = {
    **_TINY,
    "hidden_size": 45,
    "num_attention_heads": 3,
    "intermediate_size": 61,
    "head_dim": 22,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1000.0, **values}


_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
_LONG = _rope(
    "longrope",
    short_factor=[1.0 + 0.1 * pair for pair in range(4)],
    long_factor=[1.0 + 0.7 * pair for pair in range(4)],
    original_max_position_embeddings=8,
)
_SLIDES = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

CONFIGS: dict[str, Any] = {
    "mistral, window": MistralConfig(**_TINY, num_key_value_heads=2, sliding_window=5),
    "mistral, one key head, tied": MistralConfig(
        **{**_TINY, "tie_word_embeddings": True}, num_key_value_heads=1, sliding_window=None
    ),
    "mistral, odd": MistralConfig(**_ODD, num_key_value_heads=3, sliding_window=7),
    "mistral, linear": MistralConfig(
        **_TINY, num_key_value_heads=3, sliding_window=None, rope_parameters=_rope("linear", factor=4.0)
    ),
    "qwen2": Qwen2Config(**_TINY, num_key_value_heads=2),
    "qwen2, windows": Qwen2Config(**_TINY, num_key_value_heads=1, **_SLIDES),
    "qwen2, tied, yarn": Qwen2Config(
        **_TINY, num_key_value_heads=6, tie_word_embeddings=True, rope_parameters=_YARN
    ),
    "qwen2, gelu": Qwen2Config(**_TINY, num_key_value_heads=3, hidden_act="gelu"),
    "qwen3": Qwen3Config(**_TINY, num_key_value_heads=2, head_dim=8),
    "qwen3, odd, biases": Qwen3Config(**_ODD, num_key_value_heads=1, attention_bias=True),
    "qwen3, windows": Qwen3Config(**_TINY, num_key_value_heads=3, head_dim=16, **_SLIDES),
    "qwen3, tied, llama3": Qwen3Config(
        **_TINY, num_key_value_heads=6, head_dim=8, tie_word_embeddings=True, rope_parameters=_LLAMA3
    ),
    "phi3": Phi3Config(**_TINY, num_key_value_heads=2),
    "phi3, window, tied": Phi3Config(
        **{**_TINY, "tie_word_embeddings": True}, num_key_value_heads=1, sliding_window=5
    ),
    "phi3, longrope": Phi3Config(
        **_TINY,
        num_key_value_heads=6,
        original_max_position_embeddings=8,
        rope_parameters=_LONG,
    ),
    "phi3, partial": Phi3Config(
        **{**_TINY, "hidden_size": 96},
        num_key_value_heads=3,
        rope_parameters=_rope("default", partial_rotary_factor=0.5),
    ),
    "granite": GraniteConfig(
        **_TINY,
        num_key_value_heads=2,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.5,
    ),
    "granite, biases, tied": GraniteConfig(
        **_TINY, num_key_value_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "granite, yarn": GraniteConfig(**_TINY, num_key_value_heads=6, logits_scaling=4.0, rope_parameters=_YARN),
    "granite, relu": GraniteConfig(**_TINY, num_key_value_heads=3, hidden_act="relu"),
    "olmo2": Olmo2Config(**_TINY, num_key_value_heads=2),
    "olmo2, one key head, biases": Olmo2Config(**_TINY, num_key_value_heads=1, attention_bias=True),
    "olmo2, tied": Olmo2Config(**_TINY, num_key_value_heads=6, tie_word_embeddings=True),
    "olmo2, linear": Olmo2Config(**_TINY, num_key_value_heads=3, rope_parameters=_rope("linear", factor=2.0)),
    "gemma3": Gemma3TextConfig(
        **{**_TINY, "num_hidden_layers": 7}, num_key_value_heads=2, head_dim=8, sliding_window=5
    ),
    "gemma3, one key head": Gemma3TextConfig(
        **_TINY,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3, cap": Gemma3TextConfig(**_TINY, num_key_value_heads=3, head_dim=8, final_logit_softcapping=3.0),
    "gemma3, untied, odd": Gemma3TextConfig(**{**_ODD, "tie_word_embeddings": False}, num_key_value_heads=3),
    "gpt_neox": GPTNeoXConfig(**_TINY, rope_parameters=_rope("default", partial_rotary_factor=0.25)),
    "gpt_neox, serial": GPTNeoXConfig(**_TINY, use_parallel_residual=False),
    "gpt_neox, whole, tied": GPTNeoXConfig(
        **_TINY, tie_word_embeddings=True, rope_parameters=_rope("default", partial_rotary_factor=1.0)
    ),
    "gpt_neox, no biases, linear": GPTNeoXConfig(
        **_TINY,
        attention_bias=False,
        rope_parameters=_rope("linear", factor=2.0, partial_rotary_factor=0.5),
    ),
    "gptj": GPTJConfig(**_SMALL, rotary_dim=4),
    "gptj, whole": GPTJConfig(**_SMALL, rotary_dim=12),
    "gptj, inner": GPTJConfig(**_SMALL, rotary_dim=8, n_inner=61),
    "gptj, one head": GPTJConfig(**{**_SMALL, "n_head": 1}, rotary_dim=6, activation_function="relu"),
    "opt": OPTConfig(**_TINY, ffn_dim=88, word_embed_proj_dim=48),
    "opt, untied": OPTConfig(**{**_TINY, "tie_word_embeddings": False}, ffn_dim=61, word_embed_proj_dim=48),
    "opt, no biases": OPTConfig(**_TINY, ffn_dim=88, word_embed_proj_dim=48, enable_bias=False),
    "opt, gelu": OPTConfig(**_TINY, ffn_dim=88, word_embed_proj_dim=48, activation_function="gelu"),
    "gpt_bigcode": GPTBigCodeConfig(**_SMALL),
    "gpt_bigcode, inner": GPTBigCodeConfig(**_SMALL, n_inner=61, activation_function="gelu"),
    "gpt_bigcode, untied": GPTBigCodeConfig(**{**_SMALL, "tie_word_embeddings": False}),
    "gpt_bigcode, unscaled": GPTBigCodeConfig(**{**_SMALL, "n_head": 6}, scale_attn_weights=False),
    "starcoder2": Starcoder2Config(**_TINY, num_key_value_heads=2, sliding_window=5),
    "starcoder2, one key head, untied": Starcoder2Config(
        **{**_TINY, "tie_word_embeddings": False}, num_key_value_heads=1
    ),
    "starcoder2, no biases, odd": Starcoder2Config(**_ODD, num_key_value_heads=3, use_bias=False),
    "starcoder2, yarn, relu": Starcoder2Config(
        **_TINY, num_key_value_heads=6, hidden_act="relu", rope_parameters=_YARN
    ),
}
