"""top_k_logprobs and speculative_accept against their references, and their argument errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptkern
from gptkern.ops import (
    SamplerState,
    SamplingParams,
    sample,
    sampling_probs,
    speculative_accept,
    top_k_logprobs,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "beams", "vocab", "k"), [(2, 3, 500, 6), (1, 1, 7, 7), (3, 4, 5, 20), (1, 2, 50257, 40)]
)
def test_top_k_is_that_of_the_flat_log_softmax(
    batch: int, beams: int, vocab: int, k: int, dtype: torch.dtype
) -> None:
    logits = (torch.randn(batch, beams, vocab) * 3).to(dtype)
    scores = torch.randn(batch, beams)
    values, beam, token = top_k_logprobs(logits, k, scores=scores)
    flat = (torch.log_softmax(logits.double(), -1).float() + scores[..., None]).flatten(1)
    torch.testing.assert_close(flat.gather(1, beam * vocab + token), values, rtol=3e-7, atol=0)
    torch.testing.assert_close(values, flat.topk(k).values, rtol=3e-7, atol=0)
    with gptkern.backend("reference"):
        expected = top_k_logprobs(logits, k, scores=scores)
    torch.testing.assert_close(values, expected[0], rtol=3e-7, atol=0)


def test_top_k_ties_go_to_the_lower_beam_then_token() -> None:
    values, beam, token = top_k_logprobs(torch.zeros(1, 2, 4), 6)
    assert beam.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert token.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert values.unique().numel() == 1


def test_top_k_errors() -> None:
    for k in (0, 21):
        with pytest.raises(ValueError, match="k is"):
            top_k_logprobs(torch.randn(1, 4, 5), k)
    for backend in ("auto", "reference"):
        with gptkern.backend(backend), pytest.raises(ValueError, match="NaN"):
            top_k_logprobs(torch.full((1, 1, 5), math.nan), 2)
    with pytest.raises(ValueError, match="scores"):
        top_k_logprobs(torch.randn(1, 4, 5), 2, scores=torch.zeros(1, 3))


@pytest.mark.parametrize("certain", [False, True])
def test_speculation_is_that_of_the_reference(certain: bool) -> None:
    batch, n, vocab = 200, 3, 40
    target = torch.randn(batch, n + 1, vocab)
    q = torch.softmax(target[:, :n] + torch.randn(batch, n, vocab) * 0.5, -1)
    drafts = torch.multinomial(q.flatten(0, 1), 1).view(batch, n)
    params = SamplingParams.make(
        batch,
        vocab,
        top_k=30,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        min_new_tokens=2,
        eos_token_id=5,
    )
    states = [SamplerState.make(batch, vocab, seed=4, history=True) for _ in range(2)]
    for _ in range(2):
        got = speculative_accept(drafts, None if certain else q, target, params, state=states[0])
        with gptkern.backend("reference"):
            expected = speculative_accept(drafts, None if certain else q, target, params, state=states[1])
        assert torch.equal(got.tokens, expected.tokens)
        assert torch.equal(got.n_accepted, expected.n_accepted)
        assert torch.equal(states[0].counters, states[1].counters)
        assert torch.equal(states[0].counts, states[1].counts)
    assert 0 < got.n_accepted.float().mean() < n


@pytest.mark.parametrize("certain", [False, True])
def test_drafts_of_different_lengths(certain: bool) -> None:
    """Each row as if it stood alone with a draft of its length; what stands after that is not read."""
    batch, n, vocab = 60, 3, 40
    target = torch.randn(batch, n + 1, vocab)
    q = torch.softmax(target[:, :n] + torch.randn(batch, n, vocab) * 0.5, -1)
    drafts = torch.multinomial(q.flatten(0, 1), 1).view(batch, n)
    lengths = torch.arange(batch) % (n + 1)
    params = SamplingParams.make(batch, vocab, top_k=30, repetition_penalty=1.2, frequency_penalty=0.3)
    unread = torch.arange(n + 1) > lengths[:, None]
    target = target.masked_fill(unread[..., None], math.nan)
    q = q.masked_fill(unread[:, 1:, None], math.nan)
    drafts = drafts.masked_fill(unread[:, 1:], -7)
    probs = None if certain else q
    states = [SamplerState.make(batch, vocab, seed=4, history=True) for _ in range(3)]
    got = speculative_accept(drafts, probs, target, params, state=states[0], draft_lengths=lengths.int())
    with gptkern.backend("reference"):
        expected = speculative_accept(drafts, probs, target, params, state=states[1], draft_lengths=lengths)
    for row in range(batch):
        length, own = int(lengths[row]), states[2]
        alone = SamplerState(own.counters[row : row + 1].clone(), own.counts[row : row + 1].clone())
        one = SamplingParams.make(1, vocab, top_k=30, repetition_penalty=1.2, frequency_penalty=0.3)
        part = slice(row, row + 1)
        short = None if certain else q[part, :length]
        found = speculative_accept(drafts[part, :length], short, target[part, : length + 1], one, state=alone)
        assert got.tokens[row, : length + 1].tolist() == found.tokens[0].tolist()
        assert got.n_accepted[row] == found.n_accepted[0]
        assert (got.tokens[row, length + 1 :] == -1).all()
        assert torch.equal(states[0].counters[row], alone.counters[0])
        assert torch.equal(states[0].counts[row], alone.counts[0])
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.n_accepted, expected.n_accepted)
    assert torch.equal(states[0].counters, states[1].counters)
    assert (got.n_accepted == lengths).any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lengths_of_drafts_that_do_not_fit(backend: Any) -> None:
    drafts, target = torch.zeros(2, 2, dtype=torch.int64), torch.randn(2, 3, 20)
    params = SamplingParams.make(2, 20)
    refused = [
        (torch.tensor([0, 3]), ValueError, r"draft_lengths\[1\] is outside of 0 to the number of drafted"),
        (torch.tensor([-1, 2]), ValueError, r"draft_lengths\[0\] is outside"),
        (torch.tensor([2]), ValueError, r"draft_lengths has shape \(1,\); \(2,\) is needed"),
        (torch.tensor([1.0, 2.0]), TypeError, "draft_lengths is float32"),
        ([1, 2], TypeError, "draft_lengths is list"),
    ]
    for lengths, error, message in refused:
        state = SamplerState.make(2, 20, history=True)
        before = state.counters.clone()
        with gptkern.backend(backend), pytest.raises(error, match=message):
            speculative_accept(drafts, None, target, params, state=state, draft_lengths=lengths)
        assert torch.equal(state.counters, before)
        assert not state.counts.any()


def test_greedy_speculation_gives_the_greedy_tokens() -> None:
    target = torch.randn(2, 3, 20)
    best = target.argmax(-1)
    drafts = best[:, :2].clone()
    drafts[1, 1] = (drafts[1, 1] + 1) % 20
    params = SamplingParams.make(2, 20, temperature=0)
    out = speculative_accept(drafts, None, target, params, state=SamplerState.make(2, 20))
    assert out.n_accepted.tolist() == [2, 1]
    narrow = speculative_accept(drafts.int(), None, target, params, state=SamplerState.make(2, 20))
    assert torch.equal(narrow.tokens, out.tokens)
    assert out.tokens.tolist() == [best[0].tolist(), [*best[1, :2].tolist(), -1]]


def test_a_refused_speculation_changes_nothing() -> None:
    target = torch.randn(2, 3, 20)
    target[1, 1] = math.nan
    drafts = target.nan_to_num().argmax(-1)[:, :2]
    params = SamplingParams.make(2, 20, temperature=0)
    for backend in ("auto", "reference"):
        state = SamplerState.make(2, 20, history=True)
        before = state.counters.clone()
        with gptkern.backend(backend), pytest.raises(ValueError, match="NaN"):
            speculative_accept(drafts, None, target, params, state=state)
        assert torch.equal(state.counters, before)
        assert not state.counts.any()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        bad = torch.tensor([[0, 20], [1, 1]])
        speculative_accept(bad, None, torch.randn(2, 3, 20), params, state=SamplerState.make(2, 20))


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.lists(numbers, min_size=6, max_size=6), min_size=1, max_size=3),
    values=st.lists(st.floats(allow_nan=True), min_size=12, max_size=12),
    plain=st.booleans(),
)
def test_any_bits_give_a_token_or_an_error(rows: list[list[float]], values: list[float], plain: bool) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    params = SamplingParams.make(len(rows), 6, n_logprobs=2)
    if not plain:
        params.values[0] = torch.tensor(values, dtype=torch.float64)
    state = SamplerState.make(len(rows), 6, seed=0, history=True)
    out = sample(logits, params, state=state, validate=False)
    assert ((out.tokens >= 0) & (out.tokens < 6)).all()
    if out.status.any():
        with pytest.raises(ValueError, match="sample: "):
            sample(logits, params, state=state)


@pytest.mark.parametrize("bad", [math.nan, -0.1, math.inf])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_draft_probabilities_that_are_none_are_refused(bad: float, backend: Any) -> None:
    target = torch.randn(3, 3, 20)
    q = target[:, :2].softmax(-1)
    drafts = q.argmax(-1)
    target[0, 0, drafts[0, 0]] = -math.inf
    params = SamplingParams.make(3, 20)
    states = [SamplerState.make(3, 20, seed=1, history=True) for _ in range(2)]
    expected = speculative_accept(drafts, q, target, params, state=states[0])
    assert expected.n_accepted[0] == 0
    with gptkern.backend(backend):
        # No draft is looked at behind the first one that is rejected.
        unseen = q.clone()
        unseen[0, 1, 3] = bad
        found = speculative_accept(drafts, unseen, target, params, state=states[1])
        assert torch.equal(found.tokens, expected.tokens)
        before = states[1].counters.clone()
        q[2, 0, 7] = bad
        with pytest.raises(ValueError, match=r"draft_probs\[2\] holds NaN, a negative number or infinity"):
            speculative_accept(drafts, q, target, params, state=states[1])
        assert torch.equal(states[1].counters, before)


@pytest.mark.parametrize("name", ["params", "state"])
def test_params_and_state_of_another_type_are_refused_by_name(name: str) -> None:
    given: dict[str, Any] = {"params": SamplingParams.make(1, 20), "state": SamplerState.make(1, 20)}
    for wrong in (None, {"temperature": 1.0}):
        given[name] = wrong
        for call in (sample, sampling_probs):
            with pytest.raises(TypeError, match=f"{name} is (NoneType|dict); a Sampl"):
                call(torch.zeros(1, 20), given["params"], state=given["state"])
        with pytest.raises(TypeError, match=f"{name} is "):
            speculative_accept(
                torch.zeros(1, 1, dtype=torch.int64),
                None,
                torch.zeros(1, 2, 20),
                given["params"],
                state=given["state"],
            )
