"""Beam searches as requests of an engine: beside others, with what they hold, and how they end."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gptkern import GPT, AsyncEngine, Engine, GPTConfig, Request, Tokenizer
from gptkern.engine.request import TokenEvent
from gptkern.ops import _dispatch

CONFIG = GPTConfig(vocab_size=61, n_positions=96, n_layer=2, n_head=2, n_embd=16, initializer_range=0.4)
PROMPT = [5, 6, 7]


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without the interpreter."""
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    return GPT(CONFIG).eval()


def search(prompt: list[int] = PROMPT, **options: Any) -> Request:
    return Request(prompt=prompt, options={"num_beams": 3, "eos_token_id": None} | options)


def run(engine: Engine) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    return events


def tokens(events: list[TokenEvent], request: int, copy: int = 0) -> list[int]:
    own = [e for e in events if (e.request, e.copy) == (request, copy)]
    return [e.token for e in own if e.token is not None]


def test_a_search_settles_its_tokens_and_scores_at_the_end(model: GPT) -> None:
    expected = model.generate(
        torch.tensor([PROMPT]),
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=7,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    engine = Engine(model, max_seqs=4)
    other = engine.add(Request(prompt=[9], options={"max_new_tokens": 20, "eos_token_id": None}))
    asked = search(num_return_sequences=2, max_new_tokens=7)
    number = engine.add(replace(asked, prompt_logprobs=1))
    for passes in range(6):
        assert {event.request for event in engine.step()} == {other}, passes
    events = run(engine)
    for copy in range(2):
        assert tokens(events, number, copy) == expected.sequences[copy, 3:].tolist()
        *before, last = [e for e in events if (e.request, e.copy) == (number, copy)]
        assert [e.score for e in before] == [None] * 6
        assert len(before[0].prompt_logprobs or ()) == len(PROMPT) - 1
        assert torch.tensor(last.score) == expected.sequences_scores[copy]
        assert last.finish_reason == "length"
    assert len(tokens(events, other)) == 14


def test_coroutines_read_a_search_like_any_request(model: GPT) -> None:
    async def read(engine: AsyncEngine, request: Request) -> list[int | None]:
        return [event.token async for event in engine.stream(request)]

    async def both() -> list[list[int | None]]:
        async with AsyncEngine(Engine(model, max_seqs=4)) as engine:
            plain = Request(prompt=[9], options={"max_new_tokens": 5, "eos_token_id": None})
            return await asyncio.gather(read(engine, search(max_new_tokens=7)), read(engine, plain))

    found, plain = asyncio.run(both())
    expected = model.generate(torch.tensor([PROMPT]), num_beams=3, max_new_tokens=7, eos_token_id=None)
    assert found == expected[0, 3:].tolist()
    assert len(plain) == 5


def test_beams_copy_a_page_each_and_pass_at_most_and_give_all_back(model: GPT) -> None:
    engine = Engine(model, max_seqs=8, page_size=8)
    engine.add(search(num_beams=4, max_new_tokens=60))
    engine.add(search([8] * 20, num_beams=3, max_new_tokens=60))
    copied = 0
    while engine.has_work:
        engine.step()
        assert engine.cache.copied_pages - copied <= 7
        copied = engine.cache.copied_pages
    assert 0 < copied < 7 * 60
    assert engine.cache.free_pages == engine.cache.num_pages
    assert engine.cache.sequences == []


def test_searches_that_give_way_begin_anew_and_find_the_same(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [
        model.generate(torch.tensor([[token] * 9]), num_beams=3, max_new_tokens=20, eos_token_id=None)
        for token in (5, 6)
    ]
    # Each search alone may need 20 pages of 4 tokens.
    engine = Engine(model, max_seqs=9, page_size=4, cache_tokens=88, prefix_cache=False)
    for token in (7, 8, 9):
        engine.add(Request(prompt=[token] * 5, options={"max_new_tokens": 24, "eos_token_id": None}))
    numbers = [engine.add(search([token] * 9, max_new_tokens=20)) for token in (5, 6)]
    gave_way: list[int] = []
    give_way = engine._scheduler._give_way
    monkeypatch.setattr(
        engine._scheduler, "_give_way", lambda row: (gave_way.append(len(row.generated)), give_way(row))[1]
    )
    events = run(engine)
    assert engine.load.preemptions == len(gave_way) > 0
    assert max(gave_way) > 1
    for number, expected in zip(numbers, alone, strict=True):
        assert tokens(events, number) == expected[0, 9:].tolist()


@pytest.mark.parametrize("end", [run, Engine.clear], ids=["run", "clear"])
def test_nothing_of_a_search_waits_for_the_garbage_collector(
    model: GPT, end: Callable[[Engine], object]
) -> None:
    engine = Engine(model, max_seqs=3)
    number = engine.add(search(max_new_tokens=5))
    engine.step()
    rows = [weakref.ref(row) for row in engine._live[number].rows]
    gc.disable()
    try:
        end(engine)
        assert [row() for row in rows] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_search_that_is_cut_short_ends_every_copy(model: GPT, how: str, passes: int) -> None:
    engine = Engine(model, max_seqs=3)
    request = search(num_return_sequences=2, max_new_tokens=50)
    number = engine.add(request)
    for _ in range(passes):
        assert engine.step() == []
    if how == "cancel":
        engine.cancel(number)
        engine.cancel(number)
    else:
        engine._follow_inbox()
        for row in engine._live[number].rows:
            row.deadline = 0.0
        engine._scheduler._timed.update(engine._live[number].rows)
    events = run(engine)
    reason = {"cancel": "cancelled"}.get(how, how)
    assert [(e.copy, e.token, e.finish_reason) for e in events] == [(0, None, reason), (1, None, reason)]
    assert engine.cache.free_pages == engine.cache.num_pages
    assert engine.cache.sequences == []


def test_a_search_whose_logits_are_spoilt_ends_alone(model: GPT) -> None:
    engine = Engine(model, max_seqs=7)
    good, bad = engine.add(search(max_new_tokens=8)), engine.add(search([9, 10], max_new_tokens=8))
    engine.step()
    engine.step()
    sequence = engine._live[bad].rows[1].sequence
    assert sequence is not None
    engine.cache.k[:, engine.cache.pages(sequence)[-1]] = torch.nan
    events = run(engine)
    (end,) = (event for event in events if event.request == bad)
    assert (end.finish_reason, str(end.error)) == (
        "error",
        "beam 1: the logits hold NaN; numbers and -inf are accepted",
    )
    expected = model.generate(torch.tensor([PROMPT]), num_beams=3, max_new_tokens=8, eos_token_id=None)
    assert tokens(events, good) == expected[0, 3:].tolist()


def test_text_and_stop_strings_of_a_search(model: GPT) -> None:
    tokenizer = Tokenizer.characters({chr(65 + token): token for token in range(61)})
    found = model.generate_text(
        [PROMPT], tokenizer=tokenizer, num_beams=3, max_new_tokens=12, eos_token_id=None
    )
    stop = found[0].text[4:6]
    (expected,) = model.generate_text(
        [PROMPT],
        tokenizer=tokenizer,
        num_beams=3,
        max_new_tokens=12,
        eos_token_id=None,
        stop_strings=stop,
        pad_token_id=0,
    )
    engine = Engine(model, max_seqs=3)
    engine.add(search(max_new_tokens=12, stop_strings=stop), tokenizer)
    events = run(engine)
    assert "".join(event.text for event in events) == expected.text
    assert events[-1].finish_reason == expected.finish_reason


@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
def test_every_beam_of_a_steered_search_is_steered(model: GPT) -> None:
    def found(vector: torch.Tensor | None, *others: Request) -> list[int]:
        engine = Engine(model, max_seqs=6, steering=True)
        steering = None if vector is None else {1: vector}
        number = engine.add(replace(search(max_new_tokens=9), steering=steering))
        for other in others:
            engine.add(other)
        return tokens(run(engine), number)

    vector = torch.randn(16, generator=torch.Generator().manual_seed(2)) * 4
    steered = found(vector)
    assert found(torch.zeros(16)) == found(None) != steered
    assert found(vector, search(max_new_tokens=9)) == steered

    def add(module: torch.nn.Module, given: object, out: tuple[torch.Tensor, Any]) -> tuple[Any, Any]:
        return out[0] + vector, out[1]

    hook = model.transformer.h[0].register_forward_hook(add)
    try:
        expected = model.generate(torch.tensor([PROMPT]), num_beams=3, max_new_tokens=9, eos_token_id=None)
    finally:
        hook.remove()
    assert steered == expected[0, 3:].tolist()


def test_fewer_sequences_than_asked_for_is_an_error() -> None:
    tiny = GPT(GPTConfig(vocab_size=3, n_positions=16, n_layer=1, n_head=1, n_embd=8)).eval()
    engine = Engine(tiny, max_seqs=8)
    engine.add(search([0, 1], num_beams=4, num_return_sequences=4, max_new_tokens=1))
    *found, last = run(engine)
    assert [event.finish_reason for event in found] == ["length"] * 3
    assert str(last.error) == "num_return_sequences is 4; the search found 3 sequences"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": 0}, "logprobs with num_beams > 1; beam search gives scores of whole sequences"),
        ({"logits_processor": print}, "logits_processor with num_beams > 1; beam search has none"),
        ({"stopping_criteria": print}, "stopping_criteria with num_beams > 1; beam search has none"),
    ],
)
def test_a_search_refuses_by_name_what_it_has_not(model: GPT, fields: Any, message: str) -> None:
    engine = Engine(model)
    request = Request(prompt=PROMPT, options={"num_beams": 2}, **fields)
    with pytest.raises(ValueError, match=f"Engine.add: {message}"):
        engine.add(request)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculate": 2}, "speculate with num_beams 2"),
        ({"do_sample": True}, "num_beams is 2 with do_sample=True"),
        ({"num_return_sequences": 3}, "num_return_sequences is 3, num_beams 2"),
    ],
)
def test_options_that_do_not_go_with_beams_are_refused(model: GPT, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model).add(search(**{"num_beams": 2} | options))
