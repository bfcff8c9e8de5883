"""GPTConfig: read from and written to transformers' config.json, and refusing what it cannot be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import GPT2Config, OpenAIGPTConfig

from gptkern import GPT, GPTConfig

SHARED = [
    field.name for field in dataclasses.fields(GPTConfig) if field.name not in ("bias", "activation_function")
]


@pytest.mark.parametrize(
    "options", [{}, {"n_inner": 7, "eos_token_id": [1, 2], "activation_function": "relu"}]
)
def test_gpt2_config(options: dict[str, Any]) -> None:
    theirs = GPT2Config(**options)
    config = GPTConfig.from_dict(theirs.to_dict())
    for name in SHARED:
        value = getattr(theirs, name)
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value), name
    assert config.activation_function == theirs.activation_function
    assert GPTConfig.from_dict(config.to_dict()) == config


def test_defaults_are_those_of_transformers() -> None:
    assert (
        GPTConfig.from_dict({"model_type": "gpt2"})
        == GPTConfig.from_dict(GPT2Config().to_dict())
        == GPTConfig()
    )
    assert GPTConfig.from_dict({"model_type": "openai-gpt"}) == GPTConfig.from_dict(
        OpenAIGPTConfig().to_dict()
    )
    gpt1 = GPTConfig.from_dict({"model_type": "openai-gpt"})
    assert (gpt1.vocab_size, gpt1.n_positions, gpt1.eos_token_id) == (40478, 512, None)


@pytest.mark.parametrize(
    ("afn", "activation"), [("gelu", "gelu_tanh"), ("relu", "relu"), ("silu", "silu"), ("swish", "silu")]
)
def test_gpt1_activations(afn: str, activation: str) -> None:
    config = GPTConfig.from_dict(OpenAIGPTConfig(afn=afn).to_dict())
    assert config.activation == activation
    assert GPTConfig.from_dict(config.to_dict()) == config


def test_other_names_and_old_files() -> None:
    config = GPTConfig.from_dict(
        {"model_type": "gpt2", "hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 2}
    )
    assert (config.n_embd, config.n_head, config.n_layer) == (96, 3, 2)
    assert GPTConfig.from_dict({"architectures": ["OpenAIGPTLMHeadModel"]}).post_norm
    with pytest.raises(ValueError, match="model_type is None; supported are gpt2, openai-gpt"):
        GPTConfig.from_dict({"n_embd": 96})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0; a positive integer"),
        ({"n_layer": True}, "n_layer is True; a positive integer"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5; a positive integer"),
        ({"n_inner": -1}, "n_inner is -1"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head"),
        ({"activation_function": "tanh"}, "activation_function is 'tanh'"),
        ({"activation_function": ["gelu"]}, "activation_function is"),
        ({"attn_pdrop": 1.0}, "0 <= attn_pdrop < 1"),
        ({"attn_pdrop": "0.1"}, "attn_pdrop is '0.1'; a finite number"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0; a positive number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"bias": 1}, "bias is 1; True or False"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": ("a",)}, "eos_token_id is"),
        ({"bos_token_id": 1.0}, "bos_token_id is 1.0"),
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"),
        ({"model_type": "openai-gpt", "n_inner": 8}, "n_inner is 8; openai-gpt's is always None"),
        ({"model_type": "openai-gpt", "activation_function": "gelu"}, "openai-gpt's are gelu_new"),
        ({"model_type": "openai-gpt", "scale_attn_weights": False}, "scale_attn_weights is False"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GPTConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_inner": 7},
        {"bias": False},
        {"tie_word_embeddings": False},
        {"model_type": "openai-gpt"},
    ],
)
def test_parameters(options: dict[str, Any]) -> None:
    config = GPTConfig(vocab_size=11, n_positions=5, n_layer=3, n_head=2, n_embd=6, **options)
    assert config.parameters == sum(parameter.numel() for parameter in GPT(config).parameters())


@pytest.mark.parametrize("head", ["Model", "LMHeadModel", "DoubleHeadsModel", "ForSequenceClassification"])
def test_architectures_without_a_model_type(head: str) -> None:
    assert not GPTConfig.from_dict({"architectures": [f"GPT2{head}"]}).post_norm
    assert GPTConfig.from_dict({"architectures": [f"OpenAIGPT{head}"], "model_type": None}).post_norm
    with pytest.raises(ValueError, match="model_type is None"):
        GPTConfig.from_dict({"architectures": ["GPT2LMHeadCustomModel"]})
