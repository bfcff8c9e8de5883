"""``generate`` of accelerated models: what transformers' own tests of it ask for, beside the library."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from families import CONFIGS as OTHERS
from family_models import TINY, library_model
from transformers import LlamaConfig

import gptkern

CONFIGS = {"llama": LlamaConfig(**TINY, num_key_value_heads=2), **OTHERS}
NAMES = ("llama", "gemma3", "gpt_neox")
EACH = [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in NAMES]
MASK = torch.ones(2, 9, dtype=torch.long)
MASK[0, :3] = 0
IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(4))
BASE: dict[str, Any] = {
    "max_new_tokens": 12,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
}
# The library's tests of generate, by what they ask for.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 1.2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beams, sampled": {"do_sample": True, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "without a cache": {"do_sample": False, "use_cache": False},
    "processors": {
        "do_sample": False,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "min_length": 14,
    },
}


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    found = {}
    for name in NAMES:
        model = library_model(CONFIGS[name])
        model.set_attn_implementation("sdpa")
        found[name] = (model, gptkern.accelerate(copy.deepcopy(model)))
    return found


def same(found: Any, expected: Any) -> None:
    """Two results of ``generate`` hold the same fields, tokens and numbers."""
    assert type(found) is type(expected)
    assert {name for name, value in found.items() if value is not None} == {
        name for name, value in expected.items() if value is not None
    }
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("sequences_scores", "scores", "logits"):
        mine, theirs = (getattr(result, name, None) for result in (found, expected))
        for own, other in zip(
            mine if mine is not None else (), theirs if mine is not None else (), strict=True
        ):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-4)
    if getattr(found, "beam_indices", None) is not None:
        assert torch.equal(found.beam_indices, expected.beam_indices)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EACH)
def test_results_are_the_librarys(name: str, mode: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    results = []
    for model in reversed(pairs[name]):
        torch.manual_seed(3)
        results.append(model.generate(IDS, attention_mask=MASK, **BASE, **MODES[mode]))
    same(*results)


@pytest.mark.parametrize("name", EACH)
def test_an_assistant_changes_no_token(name: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    theirs, ours = pairs[name]
    greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    plain = theirs.generate(IDS[1:], **greedy)
    other = library_model(CONFIGS[name], seed=5) if name == "llama" else copy.deepcopy(theirs)
    for assistant in (other, gptkern.accelerate(copy.deepcopy(other))):
        assert torch.equal(ours.generate(IDS[1:], assistant_model=assistant, **greedy), plain)
    lookup = ours.generate(IDS[1:], prompt_lookup_num_tokens=3, **greedy)
    assert torch.equal(lookup, plain)


@pytest.mark.parametrize("name", EACH)
def test_a_second_call_goes_on_from_the_cache(name: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "return_dict_in_generate": True}
    for model in pairs[name]:
        first = model.generate(IDS[1:], **greedy)
        cache = first.cache if hasattr(first, "cache") else first.past_key_values
        field = "cache" if hasattr(first, "cache") else "past_key_values"
        second = model.generate(first.sequences, **{field: cache}, **greedy)
        whole = model.generate(IDS[1:], **greedy | {"max_new_tokens": 10})
        assert torch.equal(second.sequences, whole.sequences)


@pytest.mark.parametrize("name", EACH)
def test_embeddings_in_the_place_of_ids(name: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    theirs, ours = pairs[name]
    greedy = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    given = theirs.get_input_embeddings()(IDS[1:])
    expected = theirs.generate(inputs_embeds=given, **greedy)
    assert torch.equal(ours.generate(inputs_embeds=given, **greedy), expected)
    assert torch.equal(expected, theirs.generate(IDS[1:], **greedy)[:, 9:])
