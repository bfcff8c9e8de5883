"""The decoder's modules of every form: against transformers, and through the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CONFIGS
from family_models import TINY, gradients, library_model, our_model
from transformers import LlamaConfig, SmolLM3Config

LLAMAS = {
    "grouped": LlamaConfig(**TINY, num_key_value_heads=2),
    "one key head, tied": LlamaConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=True),
    "odd widths, biases": LlamaConfig(
        **{**TINY, "hidden_size": 45, "num_attention_heads": 3, "intermediate_size": 61},
        head_dim=22,
        attention_bias=True,
        mlp_bias=True,
    ),
    "layers without rotation, windows": SmolLM3Config(
        **{**TINY, "num_hidden_layers": 4}, num_key_value_heads=3, use_sliding_window=True, sliding_window=5
    ),
}


ALL = LLAMAS | CONFIGS


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_logits_loss_and_gradients_are_those_of_transformers(config: Any) -> None:
    theirs = library_model(config)
    ours = our_model(theirs)
    ids = torch.randint(67, (2, 19), generator=torch.Generator().manual_seed(1))
    expected, found = theirs(ids, labels=ids), ours(ids, labels=ids)
    assert found.loss is not None
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
    assert abs(found.loss.item() - expected.loss.item()) < 1e-5
    expected.loss.backward()
    found.loss.backward()
    wanted = gradients(ours.config, theirs)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_greedy_tokens_are_those_of_transformers(config: Any) -> None:
    theirs = library_model(config)
    ours = our_model(theirs)
    ids = torch.randint(67, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **options), expected)
    for row in range(3):
        prompt = ids[row : row + 1, 4 * (row == 1) :]
        alone = ours.generate(prompt, torch.ones_like(prompt), **options)
        assert torch.equal(alone[0], expected[row, 4 * (row == 1) :])
