"""Speculation by prompt lookup: every call gives token for token what it gives without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate_support import VOCAB, pair

from gptkern import ops
from gptkern.cache import KVCache
from gptkern.decode import DecodeStep
from gptkern.generate import loop, verify
from gptkern.generate.cpu_step import CpuStep, pays
from gptkern.generate.lookup import Lookup
from gptkern.generate.run import GenerateOutput
from gptkern.generate.step import Step
from gptkern.model import GPT
from gptkern.ops import _dispatch

NEW = 24


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a CPU without the interpreter."""
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)


def model() -> GPT:
    return pair("odd width")[1]


def repetitive(seed: int, batch: int = 1, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    motif = torch.randint(2, VOCAB, (batch, 1 + seed % 7), generator=generator)
    return motif.repeat(1, length)[:, :length]


def both(ids: torch.Tensor, speculate: int = 4, **options: Any) -> tuple[GenerateOutput, GenerateOutput]:
    options = {"max_new_tokens": NEW, "pad_token_id": 0, "return_dict_in_generate": True} | options
    return model().generate(ids, **options), model().generate(ids, speculate=speculate, **options)


def assert_same(plain: GenerateOutput, drafted: GenerateOutput) -> None:
    assert torch.equal(plain.sequences, drafted.sequences)
    assert plain.finish_reasons == drafted.finish_reasons
    if plain.logprobs is not None:
        assert drafted.logprobs is not None
        assert torch.equal(plain.logprobs, drafted.logprobs)


def test_lookup_takes_the_latest_longest_run_and_goes_on_past_the_end() -> None:
    assert Lookup([1, 2, 3]).draft(4) == []
    assert Lookup([1, 2, 9, 5, 2, 8, 1, 2]).draft(2) == [9, 5]
    assert Lookup([2, 8, 2, 9, 2]).draft(1) == [9]
    assert Lookup([7, 1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]
    assert Lookup([1, 1]).draft(0) == []


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("kind", ["repetitive", "random"])
def test_greedy_is_plain_greedy_on_500_prompts(kind: str) -> None:
    drafted = accepted = 0
    for seed in range(250):
        ids = repetitive(seed) if kind == "repetitive" else torch.randint(2, VOCAB, (1, 1 + seed % 30))
        plain, found = both(ids, eos_token_id=None, speculate=1 + seed % 7)
        assert_same(plain, found)
        drafted, accepted = drafted + found.draft_tokens, accepted + found.accepted_tokens
    assert 0 < accepted < drafted


def test_greedy_is_plain_greedy_by_the_kernels() -> None:
    gpt = pair("one layer")[1]
    options: dict[str, Any] = {"max_new_tokens": 18, "eos_token_id": None, "pad_token_id": 0}
    ids = repetitive(1, 2, 6)
    plain, found = gpt.generate(ids, **options), gpt.generate(ids, speculate=2, **options)
    assert torch.equal(plain, found)


SAMPLED = {"do_sample": True, "seed": 3, "temperature": 0.6, "eos_token_id": [5, 6, 7, 8, 9]}


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    "options",
    [
        {},
        SAMPLED,
        SAMPLED | {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_new_tokens": 10},
        SAMPLED | {"top_k": 3, "top_p": 0.8, "output_logprobs": True},
        {"presence_penalty": 9.0, "output_logprobs": True},
        {"no_repeat_ngram_size": 2},
        {"max_new_tokens": 76},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_same_tokens_for_every_setting(batch: int, options: dict[str, Any]) -> None:
    for seed in range(3):
        assert_same(*both(repetitive(seed, batch), **options))


@pytest.mark.usefixtures("cpu")
def test_copies_of_a_prompt_draw_apart() -> None:
    plain, found = both(repetitive(1), **SAMPLED, num_return_sequences=4)
    assert_same(plain, found)
    assert len({tuple(row) for row in found.sequences.tolist()}) > 1


@pytest.mark.usefixtures("cpu")
def test_a_streamer_gets_the_same_steps() -> None:
    class Kept:
        def __init__(self) -> None:
            self.values: list[list[Any]] = []

        def put(self, value: torch.Tensor) -> None:
            self.values.append(value.tolist())

        def end(self) -> None:
            self.values.append([])

    plain, found = Kept(), Kept()
    for kept, more in ((plain, {}), (found, {"speculate": 4})):
        model().generate(
            repetitive(2, 3), max_new_tokens=NEW, pad_token_id=0, streamer=kept, **SAMPLED, **more
        )
    assert plain.values == found.values


@pytest.mark.parametrize("kernels", [False, True])
def test_rows_are_bitwise_the_plain_step_and_rejects_leave_no_trace(kernels: bool) -> None:
    gpt = pair("head dim 16, one head")[1]
    kind: Any = DecodeStep if kernels else CpuStep
    if not kernels and not pays(gpt, 1):
        pytest.skip("this processor has no AVX2")
    tokens = [[5, 9, 5, 9], [7], [3, 4]]
    with torch.inference_mode(), ops.backend("kernel" if kernels else "reference"):

        def cache() -> KVCache:
            made = KVCache.for_config(gpt.config, max_seqs=3, max_len=40, page_size=4)
            made.allocate(3)
            gpt(torch.tensor([[1, 2, 3]] * 3), cache=made)
            return made

        held = cache()
        passes = verify.Verify(gpt, held, kind, 3)
        logits, free = passes(tokens), held.free_pages
        at = 0
        for row, ids in enumerate(tokens):
            plain = cache()
            step = kind(gpt, plain)
            for token in ids:
                given = torch.tensor([token if r == row else 8 for r in range(3)])
                assert torch.equal(step(given)[row], logits[at])
                at += 1
        passes.keep([1, 1, 2])
        assert held.lengths == held.seq_lens.tolist() == [4, 4, 5]
        assert held.free_pages == free + 1
        again = passes([[6], [7], [8]])
        plain = cache()
        step = kind(gpt, plain)
        step(torch.tensor([5, 7, 3]))
        assert torch.equal(step(torch.tensor([6, 7, 8]))[:2], again[:2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"speculate": 0}, ValueError, "speculate is 0; 1 or more"),
        ({"speculate": 2.0}, TypeError, "speculate is 2.0; a whole number"),
        ({"speculate": True}, TypeError, "speculate is True"),
        ({"speculate": 96}, ValueError, "speculate is 96; less than the model's context of 96"),
        ({"speculate": 2, "num_beams": 2}, ValueError, "speculate with num_beams 2"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model().generate(repetitive(0), **options)


def test_steps_carry_counts() -> None:
    assert Step([0], [1], None, [None]).drafted == 0
    assert loop.LEAST_STEPS < NEW
