"""Constraints: rows stay in their languages, whoever runs beside them, and a failure is one row's alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptkern import GPT, GPTConfig
from gptkern.engine.engine import Engine
from gptkern.engine.request import Request, TokenEvent

CONFIG = GPTConfig(vocab_size=67, n_positions=64, n_layer=1, n_head=2, n_embd=8, initializer_range=0.5)


class Cycle:
    """Tokens of each of ``sets`` in turn, ``length`` of them; it fails at place ``fails``."""

    def __init__(self, sets: list[set[int]], length: int, fails: int = -1) -> None:
        self.sets, self.length, self.fails, self.tokens = sets, length, fails, list[int]()

    @property
    def complete(self) -> bool:
        return len(self.tokens) == self.length

    def fill(self, bitmask: torch.Tensor) -> None:
        if len(self.tokens) == self.fails:
            raise ValueError("no token fits")
        words = [0] * len(bitmask)
        for token in self.sets[len(self.tokens) % len(self.sets)]:
            words[token // 32] |= 1 << token % 32
        bitmask.copy_(torch.tensor([word - 2**32 * (word >> 31) for word in words], dtype=torch.int32))

    def push(self, token: int) -> None:
        self.tokens.append(token)

    def fork(self) -> Cycle:
        twin = Cycle(self.sets, self.length, self.fails)
        twin.tokens = self.tokens.copy()
        return twin


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


def request(constraint: Cycle | None, seed: int = 1, **options: Any) -> Request:
    given = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "seed": seed, **options}
    return Request(prompt=[5, 6, 7], options=given, logprobs=0, constraint=constraint)


def events_of(engine: Engine, requests: list[Request]) -> list[list[TokenEvent]]:
    numbers = [engine.add(one) for one in requests]
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    return [[event for event in events if event.request == number] for number in numbers]


def bits(events: list[TokenEvent]) -> list[tuple[int, int | None, float | None]]:
    return [(event.copy, event.token, event.logprob) for event in sorted(events, key=lambda e: e.copy)]


def test_every_token_is_one_that_may_come_and_the_row_ends_where_none_may(model: GPT) -> None:
    sets = [{1, 2, 66}, {31, 32, 40}]
    (events,) = events_of(Engine(model), [request(Cycle(sets, 7), num_return_sequences=3)])
    for copy in range(3):
        tokens = [event.token for event in events if event.copy == copy]
        assert len(tokens) == 7
        assert all(token in sets[place % 2] for place, token in enumerate(tokens))
    assert len({tuple(e.token for e in events if e.copy == copy) for copy in range(3)}) > 1
    assert {event.finish_reason for event in events} == {None, "stop"}


def test_tokens_are_those_of_the_request_alone(model: GPT) -> None:
    requests = [
        request(Cycle([{3, 4, 9}, {60, 61}], 9)),
        request(None, seed=2, repetition_penalty=1.3),
        request(Cycle([{1, 2, 3, 65}], 30), seed=3, no_repeat_ngram_size=2, max_new_tokens=6),
        request(None, seed=4, speculate=3),
    ]
    alone = [bits(events_of(Engine(model), [one])[0]) for one in requests]
    # Three sequences at a time in few pages: rows join, leave and give way.
    together = events_of(Engine(model, max_seqs=3, cache_tokens=192), requests)
    assert [bits(events) for events in together] == alone


def test_a_failure_ends_its_own_row(model: GPT) -> None:
    other = request(Cycle([{1, 2}], 12), seed=2)
    (expected,) = events_of(Engine(model), [other])
    failed, whole = events_of(Engine(model), [request(Cycle([{3, 4}], 12, fails=4)), other])
    assert [event.finish_reason for event in failed] == [None] * 4 + ["error"]
    assert "no token fits" in str(failed[-1].error)
    assert bits(whole) == bits(expected)


def test_an_empty_mask_is_an_error_of_its_row(model: GPT) -> None:
    ((event,),) = events_of(Engine(model), [request(Cycle([set()], 12))])
    assert event.finish_reason == "error"
    assert "no token to choose" in str(event.error)


def test_what_is_no_constraint_is_refused() -> None:
    with pytest.raises(TypeError, match="constraint is int; a Constraint is needed"):
        request(3)  # type: ignore[arg-type]


def test_load_counts_sequences_pages_and_prefixes(model: GPT) -> None:
    engine = Engine(model, max_seqs=1, prefill_chunk=64)
    engine.add(request(None))
    engine.add(request(None))
    assert engine.load.waiting == 2 and engine.load.running == 0
    engine.step()
    assert (engine.load.running, engine.load.waiting) == (1, 1)
    assert engine.load.free_pages == engine.load.num_pages - 1
    while engine.has_work:
        engine.step()
    assert engine.load.running == engine.load.waiting == 0
    assert engine.load.free_pages == engine.load.num_pages
    assert (engine.load.prefix_queries, engine.load.prefix_hits) == (6, 0)
