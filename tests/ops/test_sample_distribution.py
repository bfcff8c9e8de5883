"""Draws follow the distribution they are drawn from: chi-square and Kolmogorov-Smirnov, seeds fixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from gptkern import _C
from gptkern.ops import SamplerState, SamplingParams, sample, sampling_probs, speculative_accept

DRAWS = 200_000
VOCAB = 50
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 10.0},
    {"top_k": 2},
    {"top_k": 10},
    {"top_k": 10, "temperature": 3.0},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.9, "temperature": 1.7},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 5, "top_p": 0.95, "temperature": 0.7},
    {"min_p": 0.05},
    {"min_p": 0.2, "temperature": 2.0},
    {"typical_p": 0.6},
    {"typical_p": 0.9, "top_k": 30},
    {"epsilon_cutoff": 0.02},
    {"eta_cutoff": 0.05},
    {"logit_bias": {3: 2.0, 4: -1.0}, "banned": [0, 1]},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.01, "temperature": 1.2},
]
# Bonferroni: the chance that correct code fails any of the file's tests is one in a thousand.
THRESHOLD = 1e-3 / (3 * len(SETTINGS))


def draws(setting: dict[str, Any], n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of n rows of one distribution, and that distribution."""
    logits = torch.randn(1, VOCAB) * 1.5
    params = SamplingParams.make(n, VOCAB, **setting)
    tokens = sample(logits.expand(n, -1), params, state=SamplerState.make(n, VOCAB, seed=seed)).tokens
    one = sampling_probs(logits, SamplingParams.make(1, VOCAB, **setting), state=SamplerState.make(1, VOCAB))
    return tokens, one[0].double()


def chi_square(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    seen = torch.bincount(tokens.flatten(), minlength=probs.numel()).double()
    assert not seen[probs == 0].any()
    expected = probs / probs.sum() * tokens.numel()
    rare = expected < 5
    pooled = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected)]
    kept = pooled[1] > 5
    if kept.sum() < 2:
        return 1.0
    seen, expected = (x[kept] for x in pooled)
    return float(stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_frequencies(index: int) -> None:
    torch.manual_seed(index)
    tokens, probs = draws(SETTINGS[index], DRAWS, seed=100 + index)
    assert chi_square(tokens, probs) > THRESHOLD
    # Spread evenly within its token's share of [0, 1), a draw is uniform.
    share = probs / probs.sum()
    spread = (share.cumsum(0) - share)[tokens] + share[tokens] * torch.rand(DRAWS, dtype=torch.float64)
    assert stats.kstest(spread.numpy(), "uniform").pvalue > THRESHOLD


def test_the_uniforms_are_uniform_and_independent_of_their_neighbours() -> None:
    n = 40_000
    by_step = [_C.uniforms(5, 0, step) for step in range(n)]
    by_request = [_C.uniforms(5, request, 0) for request in range(n)]
    for sequence in ([u for u, _ in by_step], [u for u, _ in by_request], [a for _, a in by_step]):
        unit = torch.tensor([x / 2**64 for x in sequence], dtype=torch.float64)
        assert stats.kstest(unit.numpy(), "uniform").pvalue > THRESHOLD
        cells = (unit[:-1] * 10).long() * 10 + (unit[1:] * 10).long()
        assert chi_square(cells, torch.full((100,), 0.01, dtype=torch.float64)) > THRESHOLD


def test_rows_and_steps_are_independent() -> None:
    n, steps = 5000, 8
    logits = torch.zeros(n, 4)
    params, state = SamplingParams.make(n, 4), SamplerState.make(n, 4, seed=1)
    drawn = torch.stack([sample(logits, params, state=state).tokens for _ in range(steps)])
    flat = torch.full((16,), 1 / 16, dtype=torch.float64)
    assert chi_square(drawn[1:] * 4 + drawn[:-1], flat) > THRESHOLD
    assert chi_square(drawn[:, 1:] * 4 + drawn[:, :-1], flat) > THRESHOLD


@pytest.mark.parametrize("certain", [False, True])
def test_speculation_has_the_targets_distribution(certain: bool) -> None:
    """Two drafted tokens from another distribution: all that comes out is the target's."""
    n = 60_000
    target, draft = torch.randn(3, VOCAB) * 1.5, torch.randn(2, VOCAB)
    q = torch.softmax(draft, -1)
    drafted = torch.stack([torch.multinomial(q[i], n, replacement=True) for i in range(2)], 1)
    if certain:
        drafted[:] = torch.tensor([3, 8])
    setting = {"top_k": 20, "temperature": 1.2}
    params, state = SamplingParams.make(n, VOCAB, **setting), SamplerState.make(n, VOCAB, seed=9)
    q_rows = None if certain else q.expand(n, -1, -1)
    out = speculative_accept(drafted, q_rows, target.expand(n, -1, -1), params, state=state)
    single, fresh = SamplingParams.make(3, VOCAB, **setting), SamplerState.make(3, VOCAB)
    p = sampling_probs(target, single, state=fresh).double()
    for position in range(3):
        given = out.tokens[out.n_accepted >= position, position]
        assert (given >= 0).all()
        if given.numel() > 1000:
            assert chi_square(given, p[position]) > THRESHOLD
    assert torch.equal(state.steps, out.n_accepted + 1)
