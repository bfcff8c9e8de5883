"""What tests/test_transformers_library.py puts beside transformers' own model tests, and runs there."""

from __future__ import annotations

import os
import unittest
from typing import Any

import torch
import transformers

from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # type: ignore[import-not-found]
from .test_training_mixin import TrainingTesterMixin  # type: ignore[import-not-found]

FAMILY = os.environ["GPTKERN_FAMILY"]
# The language model is the first, as in the library's own tests.
HEADS = (
    *("ForCausalLM", "LMHeadModel", "Model", "DoubleHeadsModel"),
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
)
CHOICES = 4
SHARED: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LIKE_LLAMA: dict[str, Any] = {
    **SHARED,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
}
LIKE_GPT2: dict[str, Any] = {**SHARED, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
# The beginning of the classes' names, and the fields of a small configuration.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", LIKE_GPT2 | {"n_inner": 37}),
    "llama": ("Llama", LIKE_LLAMA),
    "smollm3": ("SmolLM3", LIKE_LLAMA),
    "mistral": ("Mistral", LIKE_LLAMA),
    "qwen2": ("Qwen2", LIKE_LLAMA),
    "qwen3": ("Qwen3", LIKE_LLAMA | {"head_dim": 8}),
    "phi3": ("Phi3", LIKE_LLAMA | {"resid_pdrop": 0.0}),
    "granite": ("Granite", LIKE_LLAMA),
    "olmo2": ("Olmo2", LIKE_LLAMA),
    "gemma3": (
        "Gemma3Text",
        LIKE_LLAMA
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    # The library's tests want more than one pair of elements to be rotated.
    "gpt_neox": (
        "GPTNeoX",
        {k: v for k, v in LIKE_LLAMA.items() if k != "num_key_value_heads"} | {"hidden_size": 64},
    ),
    "gptj": ("GPTJ", LIKE_GPT2 | {"rotary_dim": 4, "n_inner": 37}),
    "opt": (
        "OPT",
        {k: v for k, v in LIKE_LLAMA.items() if k not in ("num_key_value_heads", "intermediate_size")}
        | {"ffn_dim": 37, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "gpt_bigcode": ("GPTBigCode", LIKE_GPT2 | {"n_inner": 37}),
    "starcoder2": ("Starcoder2", LIKE_LLAMA),
}
PREFIX, FIELDS = FAMILIES[FAMILY]
# The classes whose names begin otherwise.
NAMED = {"Gemma3TextForCausalLM": "Gemma3ForCausalLM"}


def classes() -> tuple[Any, ...]:
    """The family's classes of the library, or as accelerated subclasses."""
    names = [NAMED.get(PREFIX + head, PREFIX + head) for head in HEADS]
    found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if os.environ["GPTKERN_ACCELERATED"] == "0":
        return tuple(found)
    from gptkern.transformers import classes, models

    language = models.LIBRARY_CLASSES
    bases = [models.accelerated_class(cls) if cls in language else cls for cls in found]
    return tuple(classes._accelerating(base, cls) for base, cls in zip(bases, found, strict=True))


class Tester:
    """The small model that the library's tests ask for."""

    batch_size, seq_length, num_hidden_layers, num_attention_heads = 3, 7, 2, 4
    hidden_size = FIELDS.get("hidden_size", 32)
    vocab_size, num_labels, num_choices, is_training = 99, 3, CHOICES, True
    intermediate_size, max_position_embeddings = 37, 512

    def get_config(self) -> Any:
        return getattr(transformers, PREFIX + "Config")(**FIELDS)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, 98), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class ModelTest(ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):  # type: ignore[misc]
    """The library's tests on the classes under test."""

    all_model_classes = classes()
    # The library's tests of generate are not in its source distribution.
    all_generative_model_classes = ()
    # Says that a model loaded without a choice of attention is on "sdpa", which is what accelerating changes.
    test_sdpa_can_dispatch_non_composite_models = None

    def setUp(self) -> None:
        self.model_tester = Tester()

    def _prepare_for_class(self, inputs: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        if model_class.__name__ == "GPT2DoubleHeadsModel":
            ids = inputs.pop("input_ids")
            ids = ids[:, None].repeat(1, CHOICES, 1) if ids.dim() == 2 else ids
            inputs["input_ids"] = ids
            inputs["mc_token_ids"] = torch.zeros(ids.shape[:2], dtype=torch.long)
            if inputs.get("attention_mask") is not None:
                inputs["attention_mask"] = torch.ones(ids.shape, dtype=torch.long)
            if return_labels:
                inputs["labels"] = torch.zeros(ids.shape, dtype=torch.long)
                inputs["mc_labels"] = torch.zeros(len(ids), dtype=torch.long)
        return inputs
