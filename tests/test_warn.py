"""Warnings name the line that a user can change."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from gptkern import GPT, GPTConfig, Tokenizer
from gptkern._warn import warn


def test_a_warning_points_at_the_callers_line(tmp_path: Path) -> None:
    model = GPT(GPTConfig(vocab_size=2000, n_positions=8, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(tmp_path)
    Tokenizer.bytes().save(tmp_path)
    with pytest.warns(UserWarning, match="the model's vocab_size is 2000: is it another model's") as found:
        GPT.from_pretrained(tmp_path)
    (warning,) = found
    line = Path(__file__).read_text().splitlines()[warning.lineno - 1]
    assert (warning.filename, line.strip()) == (__file__, "GPT.from_pretrained(tmp_path)")


def test_generations_warnings_point_at_the_callers_line() -> None:
    model = GPT(GPTConfig(vocab_size=256, n_positions=8, n_layer=1, n_head=1, n_embd=8)).eval()
    model.tokenizer = Tokenizer.bytes()
    calls = [
        lambda: model.generate(torch.tensor([[1]]), max_new_tokens=1, temperature=0.5),
        lambda: model.generate_text("a", max_new_tokens=1, temperature=0.5),
        lambda: model.stream("a", max_new_tokens=1, temperature=0.5),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="temperature has no effect") as found:
            call()
        assert found[0].filename == __file__


def test_decorators_of_torch_are_no_users_line() -> None:
    inner = {"__name__": "gptkern.inner", "warn": warn, "torch": torch}
    exec("@torch.no_grad()\ndef deep():\n    warn('deep')", inner)
    with pytest.warns(UserWarning, match="deep") as found:
        inner["deep"]()
    assert found[0].filename == __file__


def test_a_warning_is_shown_once_a_line() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("once")
    assert len(found) == 1


def test_a_padded_vocabulary_is_no_other_models(tmp_path: Path) -> None:
    model = GPT(GPTConfig(vocab_size=1024, n_positions=8, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(tmp_path)
    Tokenizer.bytes().save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPT.from_pretrained(tmp_path)
