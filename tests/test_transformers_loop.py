"""The engine's own loop: when it is taken, and that its draws are distributed as the library's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from scipy import stats
from test_transformers_generate import build, prompt
from transformers.generation import logits_process as library

import gptkern
from gptkern.transformers import explain, loop, models

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 59}


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that the engine's loop has taken."""
    taken: list[Any] = []
    run = loop.run

    def counted(*args: Any) -> Any:
        taken.append(args)
        return run(*args)

    monkeypatch.setattr(models, "run", counted)
    return taken


@pytest.fixture
def fast() -> Any:
    torch.manual_seed(3)
    return gptkern.accelerate(build(), rng="philox")


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        (GREEDY, True),
        (GREEDY | {"repetition_penalty": 1.3, "min_new_tokens": 3, "suppress_tokens": [4]}, True),
        ({"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01}, True),
        ({"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3}, True),
        (GREEDY | {"return_dict_in_generate": True}, True),
        (GREEDY | {"return_dict_in_generate": True, "output_scores": True}, False),
        (GREEDY | {"no_repeat_ngram_size": 2}, False),
        (GREEDY | {"num_beams": 2}, False),
    ],
)
def test_it_takes_what_the_sampler_computes(fast: Any, loops: list[Any], options: Any, taken: bool) -> None:
    ids, mask = prompt(2, 6, True)
    found = fast.generate(ids, attention_mask=mask, max_new_tokens=5, **{"pad_token_id": 59} | options)
    assert bool(loops) == taken
    sequences = found if isinstance(found, torch.Tensor) else found.sequences
    assert sequences.shape[0] == 2 and not sequences.is_inference()
    sequences += 0


def test_warpers_in_another_order_are_the_librarys(fast: Any, loops: list[Any]) -> None:
    given = transformers.LogitsProcessorList(
        [library.TopKLogitsWarper(5), library.TemperatureLogitsWarper(0.5)]
    )
    config = transformers.GenerationConfig(do_sample=True)
    assert loop.sampler_options(given, config, 4, 61) is None
    given.reverse()
    assert loop.sampler_options(given, config, 4, 61) == {"temperature": 0.5, "top_k": 5}
    given[1] = library.TopKLogitsWarper(5, min_tokens_to_keep=2)
    config.top_p = 0.9
    assert loop.sampler_options([library.TopPLogitsWarper(0.9, min_tokens_to_keep=2)], config, 4, 61) is None
    assert loop.sampler_options([given[0], given[0]], config, 4, 61) is None


def test_sampling_draws_the_librarys_tokens_unless_it_is_told_otherwise(loops: list[Any]) -> None:
    theirs = build()
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    ids, mask = prompt(2, 6, False)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        results.append(model.generate(ids, attention_mask=mask, do_sample=True, pad_token_id=59))
    assert torch.equal(*results) and not loops


def test_philox_draws_follow_torchs_seed_and_the_librarys_distribution(fast: Any, loops: list[Any]) -> None:
    ids, _ = prompt(1, 6, False)
    options = {"do_sample": True, "top_k": 7, "top_p": 0.95, "temperature": 1.5, "max_new_tokens": 1}
    torch.manual_seed(1)
    first = fast.generate(ids, num_return_sequences=4000, **options)
    torch.manual_seed(1)
    assert torch.equal(first, fast.generate(ids, num_return_sequences=4000, **options))
    assert not torch.equal(first, fast.generate(ids, num_return_sequences=4000, **options))
    assert len(loops) == 3
    plain = gptkern.restore(fast).generate(ids, output_scores=True, return_dict_in_generate=True, **options)
    probabilities = plain.scores[0][0].double().softmax(-1)
    kept = probabilities > 0
    exact = probabilities[kept] / probabilities[kept].sum()
    counts = torch.bincount(first[:, -1], minlength=len(probabilities))
    assert not counts[~kept].any()
    assert stats.chisquare(counts[kept], 4000 * exact).pvalue > 1e-4


def test_float64_models_and_streamers_are_served(fast: Any, loops: list[Any]) -> None:
    class Streamer:
        seen: list[Any] = []  # noqa: RUF012

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.tolist())

        def end(self) -> None:
            self.seen.append("end")

    ids, _ = prompt(1, 4, False)
    found = fast.double().generate(ids, streamer=Streamer(), max_new_tokens=3, eos_token_id=None, **GREEDY)
    assert Streamer.seen == [ids.tolist(), *([t] for t in found[0, 4:].tolist()), "end"]
    assert loops


def test_what_is_asked_for_is_checked_and_told(fast: Any) -> None:
    with pytest.raises(ValueError, match="rng is 'dice'; 'torch' or 'philox' is needed"):
        gptkern.accelerate(build(), rng="dice")
    sampled = transformers.GenerationConfig(do_sample=True)
    assert "gptkern's loop and sampler" in explain(fast, sampled)[-1].reason
    assert "rng='philox' is faster" in explain(gptkern.accelerate(fast), sampled)[-1].reason
    assert "beam search" in explain(fast, transformers.GenerationConfig(num_beams=3))[-1].reason
    assert not {"_gptkern_rng", "_gptkern_generation"} & vars(gptkern.restore(fast)).keys()
