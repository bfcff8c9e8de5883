"""Exact under load: a request's tokens and log-probabilities are the bits that it has alone."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from gptkern import GPT, GPTConfig, backend
from gptkern.engine.engine import Engine
from gptkern.engine.executors import choose
from gptkern.engine.executors.torch import TorchExecutor
from gptkern.engine.request import Request, TokenEvent
from gptkern.ops import _dispatch

VOCAB = 67
Bits = list[tuple[int, float]]


def make_model(seed: int, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "n_positions": 128, "n_layer": 2, "n_head": 2, "n_embd": 32}
    kind = "openai-gpt" if seed % 4 == 3 else "gpt2"
    config = GPTConfig(
        **(sizes | {"initializer_range": 0.4, "eos_token_id": 0, "model_type": kind} | changes)
    )
    return GPT(config).eval()


def random_request(rng: random.Random, openings: list[list[int]]) -> Request:
    prompt = [*rng.choice(openings), *(rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 20)))]
    if rng.random() < 0.3:
        prompt = (prompt[:5] * 20)[: rng.randint(3, 60)]
    options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 20), "seed": rng.randrange(100)}
    if rng.random() < 0.7:
        options |= {"do_sample": True, "top_k": rng.choice([0, 8]), "top_p": rng.choice([0.9, 1.0])}
        options["num_return_sequences"] = rng.choice([1, 1, 1, 3])
    for name, value in (("repetition_penalty", 1.2), ("no_repeat_ngram_size", 2), ("frequency_penalty", 0.4)):
        if rng.random() < 0.15:
            options[name] = value
    if rng.random() < 0.3:
        options["speculate"] = rng.randint(1, 5)
    return Request(prompt=prompt, options=options, priority=rng.choice([0, 0, 1]), logprobs=0)


def bits(events: list[TokenEvent]) -> dict[int, Bits]:
    """Tokens and log-probabilities of each copy."""
    found: dict[int, Bits] = defaultdict(list)
    for event in events:
        if event.token is not None:
            assert event.logprob is not None
            found[event.copy].append((event.token, event.logprob))
    return found


def alone(model: GPT, request: Request, **sizes: int) -> dict[int, Bits]:
    engine = Engine(model, max_seqs=4, **sizes)
    engine.add(request)
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    return bits(events)


@dataclass
class Tally:
    """What the schedules went through."""

    preemptions: int = 0
    found_pages: int = 0
    accepted: int = 0
    cancelled: int = 0
    requests: int = 0
    together: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)


def play(seed: int, tally: Tally, **changes: Any) -> None:
    """One random schedule: arrivals at random, some cancelled, in a pool that is too small for all."""
    rng = random.Random(seed)
    model = make_model(seed % 5, **changes)
    page = rng.choice([4, 8, 16, 64])
    sizes = {"page_size": page, "prefill_chunk": page * rng.choice([1, 2, 4])}
    pool = rng.choice([96, 128, 512])
    engine = Engine(model, max_seqs=rng.randint(3, 8), cache_tokens=max(pool, 2 * page), **sizes)
    openings = [[rng.randrange(1, VOCAB) for _ in range(rng.choice([0, 17, 40]))] for _ in range(3)]
    requests = [random_request(rng, openings) for _ in range(rng.randint(3, 8))]
    waiting, numbers, events = list(requests), {}, []
    cancelled: set[int] = set()
    while waiting or engine.has_work:
        while waiting and (rng.random() < 0.3 or not engine.has_work):
            request = waiting.pop()
            numbers[engine.add(request)] = request
        if numbers and rng.random() < 0.03:
            cancelled.add(rng.choice(list(numbers)))
            engine.cancel(max(cancelled))
        step = engine.step()
        tally.together += len({event.request for event in step}) > 1
        events += step
    for number, request in numbers.items():
        own = [event for event in events if event.request == number]
        assert not any(event.error for event in own), own
        found, expected = bits(own), alone(model, request, **sizes)
        tally.accepted += sum(event.accepted for event in own)
        stopped = any(event.finish_reason == "cancelled" for event in own)
        tally.cancelled += stopped
        for copy, whole in expected.items():
            given = found.get(copy, [])
            assert given == (whole[: len(given)] if stopped else whole), (seed, number, copy, request)
    assert engine.cache.sequences == []
    assert engine.cache.free_pages == engine.cache.num_pages
    tally.preemptions += engine.preemptions
    tally.requests += len(requests)
    tally.sizes.add((page, sizes["prefill_chunk"]))


@pytest.fixture(params=["cpu", "torch"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    if request.param == "torch":
        monkeypatch.setattr(choose, "EXECUTORS", (TorchExecutor,))
    return str(request.param)


def check(tally: Tally, executor: str) -> None:
    assert tally.preemptions > 0
    assert tally.together > 0
    assert tally.cancelled > 0
    assert executor == "torch" or tally.accepted > 0


def test_schedules_change_no_bit(executor: str) -> None:
    tally = Tally()
    for seed in range(8):
        play(seed, tally)
    check(tally, executor)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_500_schedules_change_no_bit(executor: str, part: int) -> None:
    tally = Tally()
    for seed in range(1000 + 50 * part, 1050 + 50 * part):
        play(seed, tally)
    check(tally, executor)


@pytest.mark.kernels
@pytest.mark.slow
def test_schedules_change_no_bit_by_the_kernels() -> None:
    with backend("kernel"):
        for seed in range(2):
            play(seed, Tally(), n_layer=1)


def test_a_prefix_that_is_found_changes_no_bit(executor: str) -> None:
    model = make_model(1)
    sizes = {"page_size": 8, "prefill_chunk": 16}
    engine = Engine(model, max_seqs=4, **sizes)
    opening = [1 + i * 7 % (VOCAB - 1) for i in range(50)]
    computed: list[int] = []
    real = engine.executors.prefill.forward

    def counted(rows: Any) -> torch.Tensor:
        computed.append(sum(rows.counts))
        return real(rows)

    engine.executors.prefill.forward = counted  # type: ignore[method-assign]
    for tail in ([3], [5, 9, 11], [4] * 30):
        request = Request(prompt=opening + tail, options={"max_new_tokens": 9}, logprobs=0)
        engine.add(request)
        events: list[TokenEvent] = []
        computed.clear()
        while engine.has_work:
            events += engine.step()
        assert bits(events) == alone(model, request, **sizes)
        assert sum(computed) == len(request.prompt) - (0 if tail == [3] else 48)
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight.mul_(1.5)
    request = Request(prompt=[*opening, 3], options={"max_new_tokens": 9}, logprobs=0)
    engine.add(request)
    computed.clear()
    events = []
    while engine.has_work:
        events += engine.step()
    assert sum(computed) == 51
    assert bits(events) == alone(model, request, **sizes)
