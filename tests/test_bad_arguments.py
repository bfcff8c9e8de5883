"""Arguments of the wrong kind are refused by name, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptkern import GPT

IDS = torch.tensor([[1, 2, 3]])
OF_THE_MODEL: dict[str, tuple[Any, ...]] = {
    "labels": ("a", -1, [1]),
    "attention_mask": ("a", True, [1]),
    "position_ids": ("a", 3.7, [1]),
    "cache": ("a", 3, [1]),
    "logits_to_keep": ("a", None, 3.7, [1]),
    "sequences": (-1, True, object()),
    "hidden_states": ("a", -1, True, ["a"], torch.zeros(2)),
    "stop_at_layer": ("a", True, 1.5, [1], torch.zeros(2)),
    "steering": ("a", [1], 3, torch.zeros(2)),
}


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT.from_pretrained()


@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_of_a_pass(model: GPT, name: str) -> None:
    for value in OF_THE_MODEL[name]:
        with pytest.raises(TypeError, match=f"^GPT: {name} is "):
            model(IDS, **{name: value})


@pytest.mark.parametrize("value", [-1, 3.7, None, object(), [None], ["a", 3], torch.zeros(2, 3)])
def test_of_score(model: GPT, value: Any) -> None:
    with pytest.raises(TypeError, match=r"^score: texts (is|holds) "):
        model.score(value)
    if value is not None:
        with pytest.raises(TypeError, match=r"^score: context (is|holds) "):
            model.score("abc", value)


@pytest.mark.parametrize("value", ["a", 3, [1], object()])
def test_tokenizers(model: GPT, value: Any) -> None:
    with pytest.raises(TypeError, match=r"^generate: tokenizer is "):
        model.score("abc", tokenizer=value)
    if not isinstance(value, str):
        with pytest.raises(TypeError, match=r"^from_pretrained: tokenizer is "):
            GPT.from_pretrained(tokenizer=value)


@pytest.mark.parametrize("value", [3, None, [1], b"embedded", torch.zeros(2)])
def test_names_of_checkpoints(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^the checkpoint's name is "):
        GPT.from_pretrained(value)
