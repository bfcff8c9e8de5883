"""The sampler of a running batch: a row draws what it draws alone, whoever joins, leaves or fails."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gptkern
from gptkern.config import GPTConfig
from gptkern.engine import sampling
from gptkern.engine.rules import RowRules, Rules
from gptkern.engine.sampling import RowDraw, RowParams, Sampler, SamplerRow, row_keys
from gptkern.engine.settings import Settings, merged, settle
from gptkern.ops.sample import Sampled, SamplingParams

VOCAB = 67
CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=VOCAB, n_positions=512, n_layer=1, n_head=1, n_embd=8)
KINDS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 1.4},
    {"do_sample": True, "top_k": 9, "top_p": 0.8, "min_p": 0.01},
    {"do_sample": True, "repetition_penalty": 1.5, "frequency_penalty": 0.2},
    {"presence_penalty": 0.7},
    {"do_sample": True, "no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1},
    {"do_sample": True, "bad_words_ids": [[3], [5, 6], [1, 2, 3]], "suppress_tokens": [9, 11]},
    {"do_sample": True, "logit_bias": {4: 3.0, 8: -2.0}, "sequence_bias": {(4, 5): 6.0, (8, 1, 2): -1.0}},
    {"do_sample": True, "min_new_tokens": 9, "eos_token_id": [4, 60]},
    {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "top_k": 0},
]


def settings(**options: Any) -> Settings:
    asked = merged({"max_new_tokens": 400} | options, {})
    return settle(asked, CONFIG, width=8, longest=8, lengths_given=True)


def logits_of(key: int, tokens: list[int]) -> torch.Tensor:
    """A model: logits that depend on a row's latest tokens."""
    seed = hash((key % 5, *tokens[-3:])) & 0x7FFFFFFF
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


class Request:
    """A row of the test and what became of it."""

    def __init__(self, key: int, options: dict[str, Any], top: int | None) -> None:
        self.key, self.length = key, random.Random(key).randint(5, 30)
        self.params = RowParams(settings(**options), VOCAB, top)
        self.prompt = [random.Random(-key).randrange(VOCAB) for _ in range(1 + key % 8)]
        self.draws: list[tuple[int, float | None, Any]] = []
        self.begin()

    def begin(self) -> None:
        generated = [token for token, _, _ in self.draws]
        self.row = SamplerRow(
            self.params, self.prompt, seed=self.key * 7919 - 2**63, request=self.key % 3, generated=generated
        )

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *(token for token, _, _ in self.draws)]

    def take(self, draw: RowDraw) -> None:
        assert draw.failure is None
        for place, token in enumerate(draw.tokens):
            self.row.push(token)
            logprob = None if draw.logprobs is None else draw.logprobs[place]
            self.draws.append((token, logprob, draw.top_logprobs and draw.top_logprobs[place]))


def draw(sampler: Sampler, requests: list[Request], drafts: list[list[int]] | None = None) -> list[RowDraw]:
    given = drafts or [[] for _ in requests]
    logits = [
        logits_of(request.key, request.tokens + draft[:ahead])
        for request, draft in zip(requests, given, strict=True)
        for ahead in range(len(draft) + 1)
    ]
    return sampler.draw([request.row for request in requests], torch.stack(logits), drafts).read()


def alone(key: int, options: dict[str, Any], top: int | None) -> Request:
    request = Request(key, options, top)
    sampler = Sampler(VOCAB, CPU)
    while len(request.draws) < request.length:
        request.take(draw(sampler, [request])[0])
    return request


@pytest.fixture(params=["auto", "reference"])
def backend(request: Any) -> Iterator[None]:
    """The extension, and plain PyTorch."""
    with gptkern.backend(request.param):
        yield


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("backend")
def test_a_row_draws_what_it_draws_alone(seed: int) -> None:
    rng = random.Random(seed)
    waiting = [
        Request(seed * 100 + n, rng.choice(KINDS) if n else KINDS[seed], rng.choice([None, 0, 3]))
        for n in range(14)
    ]
    asked = {r.key: r for r in waiting}
    kinds = {r.key: r.params for r in waiting}
    expected = {key: _alone_like(request) for key, request in asked.items()}
    sampler, running = Sampler(VOCAB, CPU), []
    held = 0
    while waiting or running:
        while waiting and (not running or rng.random() < 0.4):
            running.append(waiting.pop())
        if rng.random() < 0.2:
            rng.shuffle(running)
        if rng.random() < 0.15:
            # preempted: it comes back later, from its tokens alone
            request = running.pop(rng.randrange(len(running)))
            request.begin()
            waiting.insert(0, request)
        if not running:
            continue
        drafts = None
        if rng.random() < 0.5:
            # half of a draft is right
            drafts = [
                [
                    token if rng.random() < 0.7 else rng.randrange(VOCAB)
                    for token, _, _ in expected[r.key].draws[len(r.draws) :][: rng.randint(0, 4)]
                ][: max(r.length - len(r.draws) - 1, 0)]
                for r in running
            ]
        for request, drawn in zip(running, draw(sampler, running, drafts), strict=True):
            request.take(drawn)
            held += len(drawn.tokens) - 1
        running = [request for request in running if len(request.draws) < request.length]
    assert held > 20
    for key, request in asked.items():
        assert request.params is kinds[key]
        assert request.draws[: request.length] == expected[key].draws


def _alone_like(request: Request) -> Request:
    twin = Request.__new__(Request)
    twin.key, twin.length, twin.params, twin.prompt = (
        request.key,
        request.length,
        request.params,
        request.prompt,
    )
    twin.draws = []
    twin.begin()
    sampler = Sampler(VOCAB, CPU)
    while len(twin.draws) < twin.length:
        twin.take(draw(sampler, [twin])[0])
    return twin


def test_log_probabilities_are_of_the_raw_logits_best_first() -> None:
    request = alone(3, KINDS[3], 4)
    tokens = list(request.prompt)
    for token, logprob, top in request.draws:
        exact = logits_of(3, tokens).double().log_softmax(-1)
        assert logprob == pytest.approx(float(exact[token]), abs=1e-5)
        best = exact.topk(4)
        assert [t for t, _ in top] == best.indices.tolist()
        assert [p for _, p in top] == pytest.approx(best.values.tolist(), abs=1e-5)
        tokens.append(token)


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize(
    ("bad", "reason"), [("nan", "hold NaN"), ("inf", "hold +inf"), ("-inf", "leave no token to choose")]
)
@pytest.mark.usefixtures("backend")
def test_a_row_that_fails_fails_alone(bad: str, reason: str, drafted: bool) -> None:
    options = {"do_sample": True, "frequency_penalty": 0.3, "suppress_tokens": [8]}
    expected = [alone(key, options, 0) for key in (1, 2, 4)]
    requests = [Request(key, options, 0) for key in (1, 2, 3, 4)]
    sampler = Sampler(VOCAB, CPU)
    for turn in range(8):
        drafts = [[5, 6], [], [7], []][: len(requests)] if drafted else [[] for _ in requests]
        logits = torch.stack(
            [
                logits_of(r.key, r.tokens + draft[:ahead])
                for r, draft in zip(requests, drafts, strict=True)
                for ahead in range(len(draft) + 1)
            ]
        )
        if turn == 2:
            logits[4 if drafted else 2] = float(bad)
        drawn = sampler.draw([r.row for r in requests], logits, drafts).read()
        if turn == 2:
            failed = drawn.pop(2)
            del requests[2]
            assert failed.tokens == [] and reason in str(failed.failure)
        for request, own in zip(requests, drawn, strict=True):
            request.take(own)
    for request, own in zip(requests, expected, strict=True):
        assert len(request.draws) >= 5
        assert request.draws[: own.length] == own.draws[: len(request.draws)]


@pytest.mark.usefixtures("backend")
def test_bans_of_every_token_fail_by_name() -> None:
    everything = list(range(VOCAB))
    with pytest.raises(ValueError, match="bar every token there is"):
        RowParams(settings(suppress_tokens=everything), VOCAB)
    params = RowParams(settings(suppress_tokens=everything[1:], no_repeat_ngram_size=1), VOCAB)
    sampler = Sampler(VOCAB, CPU)
    row = SamplerRow(params, [1], seed=0, request=0)
    assert sampler.draw([row], torch.zeros(1, VOCAB)).read()[0].tokens == [0]
    row.push(0)
    failure = sampler.draw([row], torch.zeros(1, VOCAB)).read()[0].failure
    assert "bar every token there is" in str(failure)


@pytest.mark.parametrize(("least", "lists"), [(0, False), (2, True)])
def test_end_of_text_is_a_list_only_while_it_is_banned(
    least: int, lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call without lists takes the CUDA kernel that only draws."""
    seen: list[bool] = []

    def watched(logits: torch.Tensor, params: SamplingParams, **_: Any) -> Sampled:
        seen.append(params.eos_ids is not None)
        zeros = torch.zeros(len(logits), dtype=torch.int64)
        return Sampled(zeros, None, None, zeros.int())

    monkeypatch.setattr(sampling, "serves", lambda _: False)
    monkeypatch.setattr(sampling, "sample", watched)
    params = RowParams(settings(do_sample=True, min_new_tokens=least, eos_token_id=[4, 60]), VOCAB)
    Sampler(VOCAB, CPU).draw([SamplerRow(params, [1], seed=0, request=0)], torch.zeros(1, VOCAB))
    assert seen == [lists]


def test_keys_of_rows() -> None:
    asked = settings(do_sample=True, num_return_sequences=2, seed=7)
    assert row_keys(asked, 2) == [(7, 0), (7, 1), (7, 0), (7, 1)]
    keys = row_keys(settings(do_sample=True, num_return_sequences=2), 2)
    assert len({seed for seed, _ in keys}) == 1 and [request for _, request in keys] == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [0, 1, 2, 4])
def test_rules_are_taken_back_and_forked(size: int) -> None:
    rng = random.Random(size)
    rules = Rules(
        settings(
            no_repeat_ngram_size=size,
            bad_words_ids=[[1, 2], [0, 1, 2], [3]],
            sequence_bias={(1, 1): 2.0, (2,): 1.0, (0, 0, 2): -1.0},
        )
    )
    tokens = [rng.randrange(4) for _ in range(5)]
    row = RowRules(rules, tokens)
    for _ in range(200):
        draft = [rng.randrange(4) for _ in range(rng.randint(0, 5))]
        fresh = [RowRules(rules, tokens + draft[:n]).verdict() for n in range(len(draft) + 1)]
        assert row.ahead(draft) == fresh
        assert fresh[0].banned == _barred(size, tokens)
        twin = row.fork()
        twin.push(1)
        assert row.verdict() == fresh[0]
        assert twin.verdict() == RowRules(rules, [*tokens, 1]).verdict()
        token = rng.randrange(4)
        row.push(token)
        tokens.append(token)


def _barred(size: int, tokens: list[int]) -> set[int]:
    """By looking at every place."""
    barred = {3}
    for place in range(len(tokens) - size + 1):
        gram = tokens[place : place + size]
        if size and gram[:-1] == tokens[len(tokens) - size + 1 :]:
            barred.add(gram[-1])
    for word in ([1, 2], [0, 1, 2]):
        if tokens[-len(word) + 1 :] == word[:-1]:
            barred.add(word[-1])
    return barred


class Barring:
    """Bars a token, and notes the tokens that it was shown."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.seen: list[list[int]] = []

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert ids.shape[0] == 1 and logits.shape == (1, VOCAB) and logits.dtype == torch.float32
        self.seen.append(ids[0].tolist())
        logits[0, self.token] = -float("inf")
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("backend")
def test_processors_see_a_rows_tokens_and_change_its_draws_alone(dtype: torch.dtype) -> None:
    options = {"do_sample": True, "temperature": 2.0}
    plain, barred = [RowParams(settings(**options), VOCAB, 3) for _ in range(2)]
    logits = (torch.randn(2, VOCAB) * 3).to(dtype)
    kept = logits.clone()
    exact = logits[1].float().log_softmax(-1)
    best = int(logits[1].argmax())
    processor = Barring(best)
    alone = [Sampler(VOCAB, CPU) for _ in range(2)]
    for seed in range(20):
        other = SamplerRow(plain, [1, 2], seed=seed, request=0)
        own = SamplerRow(barred, [3, 4], seed=seed, request=0, generated=[5], processors=[processor])
        processor.seen = []
        draws = Sampler(VOCAB, CPU).draw([other, own], logits).read()
        assert processor.seen == [[3, 4, 5]]
        assert torch.equal(logits, kept)
        assert draws[0] == alone[0].draw([other], logits[:1]).read()[0]
        assert draws[1] == alone[1].draw([own], logits[1:]).read()[0]
        assert draws[1].tokens != [best]
        # The model's own log-probabilities, the barred token's too.
        assert draws[1].logprobs == [pytest.approx(float(exact[draws[1].tokens[0]]), abs=1e-5)]
        assert draws[1].top_logprobs is not None
        assert draws[1].top_logprobs[0][0] == (best, pytest.approx(float(exact[best]), abs=1e-5))


def test_processors_with_drafts() -> None:
    processor = Barring(0)
    row = SamplerRow(RowParams(settings(), VOCAB), [1, 2], seed=0, request=0, processors=[processor])
    logits = torch.zeros(3, VOCAB)
    logits[:, 0] = 9.0
    logits[[0, 1, 2], [7, 8, 9]] = 5.0
    assert Sampler(VOCAB, CPU).draw([row], logits, [[7, 8]]).read()[0].tokens == [7, 8, 9]
    assert processor.seen == [[1, 2], [1, 2, 7], [1, 2, 7, 8]]


def test_a_processor_that_raises_fails_its_row_alone() -> None:
    def broken(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    params = RowParams(settings(), VOCAB)
    rows = [SamplerRow(params, [1], seed=0, request=0, processors=p) for p in ([], [broken], [])]
    rows.append(SamplerRow(params, [1], seed=0, request=0, processors=[lambda ids, logits: logits[0]]))
    logits = torch.randn(4, VOCAB)
    draws = Sampler(VOCAB, CPU).draw(rows, logits).read()
    assert [draw.tokens for draw in draws] == [[int(logits[0].argmax())], [], [int(logits[2].argmax())], []]
    assert isinstance(draws[1].failure, KeyError)
    assert "returned (67,); a tensor of shape (1, 67) is needed" in str(draws[3].failure)
