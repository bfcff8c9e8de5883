"""The decoder's modules of every form: against transformers, and through the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CONFIGS
from family_models import TINY, gradients, library_model, our_model
from transformers import LlamaConfig, SmolLM3Config

from gptkern.train.objective import LanguageModelling

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


ONE_OF_EACH = {config.model_type: name for name, config in reversed(ALL.items())}


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_errors_in_bfloat16_are_those_of_transformers_twice_at_most(family: str) -> None:
    theirs = library_model(ALL[ONE_OF_EACH[family]]).to(torch.bfloat16)
    ours = our_model(theirs).to(torch.bfloat16)
    ids = torch.randint(67, (8, 40), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        errors = [model(ids).logits.double() for model in (ours, theirs)]
        exact = theirs.double()(ids).logits
    mine, other = ((logits - exact).square().mean().sqrt() for logits in errors)
    assert 0.0 < mine <= 2.0 * other
    largest = [(logits - exact).abs().max() for logits in errors]
    assert largest[0] <= 2.0 * largest[1]


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


def test_hidden_states_are_those_of_transformers() -> None:
    theirs = library_model(LLAMAS["grouped"])
    ours = our_model(theirs)
    ids = torch.randint(67, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for given in (None, mask):
        found = ours(ids, attention_mask=given, hidden_states=[0, 2, 3]).hidden_states
        assert found is not None and list(found) == [0, 2, 3]
        for layer, state in found.items():
            torch.testing.assert_close(state[0], expected[layer][0], rtol=0, atol=1e-4)
            torch.testing.assert_close(state[1, :7], expected[layer][1, :7], rtol=0, atol=1e-4)
            if given is not None:
                assert not state[1, 7:].any()
    called: list[int] = []
    for layer, block in enumerate(ours.transformer.h):
        block.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    stopped = ours(ids, hidden_states=[2], stop_at_layer=2)
    assert stopped.logits.shape == (2, 0, 67) and called == [0, 1]
    torch.testing.assert_close(stopped.hidden_states[2][0], expected[2][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_states": [4]}, r"hidden_states is \[4\]; layers from 0 to 3"),
        ({"hidden_states": [2], "stop_at_layer": 1}, r"hidden_states is \[2\]; layers from 0 to 1"),
        ({"stop_at_layer": 3, "hidden_states": [0]}, "stop_at_layer is 3; a number from 0 to 2"),
        ({"stop_at_layer": 1}, r"hidden_states is \[\]"),
        ({"stop_at_layer": 1, "hidden_states": [1], "labels": torch.zeros(1, 2).long()}, "labels need all"),
    ],
)
def test_hidden_states_refused(options: dict[str, Any], message: str) -> None:
    model = our_model(library_model(LLAMAS["grouped"]))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 2, dtype=torch.int64), **options)


@pytest.mark.parametrize("changes", [{}, {"logits_scale": 0.25}, {"logits_softcap": 3.0}])
def test_the_training_loss_is_the_models(changes: dict[str, Any]) -> None:
    model = our_model(library_model(LLAMAS["one key head, tied"]))
    model.config.__dict__["spec"] = model.spec.replace(**changes)
    ids = torch.randint(67, (2, 12), generator=torch.Generator().manual_seed(4))
    loss = LanguageModelling(model)(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    expected = model(ids, labels=ids).loss
    assert expected is not None
    torch.testing.assert_close(loss / (2 * 11), expected, rtol=1e-5, atol=1e-5)
