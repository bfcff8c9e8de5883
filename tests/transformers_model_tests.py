"""What tests/test_transformers_library.py puts beside transformers' own model tests, and runs there."""

from __future__ import annotations

import importlib
import os
import unittest
from typing import Any

import torch
from transformers import GPT2Config

from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # type: ignore[import-not-found]

classes = importlib.import_module(os.environ["GPTKERN_CLASSES"])
NAMES = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
)
CHOICES = 4


class Tester:
    """The small model that the library's tests ask for."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 3, 7, 32, 2, 4
    vocab_size, num_labels, num_choices, is_training = 99, 3, CHOICES, True

    def get_config(self) -> Any:
        tokens = {"bos_token_id": 98, "eos_token_id": 98, "pad_token_id": 98}
        return GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_inner=37, n_positions=64, **tokens)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, 98), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class ModelTest(ModelTesterMixin, unittest.TestCase):  # type: ignore[misc]
    """The library's tests on the classes under test."""

    all_model_classes = tuple(getattr(classes, name) for name in NAMES)
    # What is tested here is the forward pass; tests/test_transformers_generate.py covers generate.
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
