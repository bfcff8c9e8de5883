"""AsyncEngine: events of concurrent streams are those of each alone, and who goes leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from gptkern import GPT, GPTConfig
from gptkern.engine import async_engine
from gptkern.engine.async_engine import AsyncEngine
from gptkern.engine.engine import Engine
from gptkern.engine.request import Request, TokenEvent

CONFIG = GPTConfig(vocab_size=31, n_positions=64, n_layer=1, n_head=2, n_embd=8, initializer_range=0.5)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


def _request(seed: int, new: int = 12, **options: Any) -> Request:
    given = {"max_new_tokens": new, "do_sample": True, "seed": seed, **options}
    return Request(prompt=[1 + seed % 7, 2, 3], options=given, logprobs=0)


def _alone(model: GPT, request: Request) -> list[tuple[int, int | None, float | None]]:
    engine = Engine(model)
    engine.add(request)
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    return [(event.copy, event.token, event.logprob) for event in events]


def _run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


async def _all(engine: AsyncEngine, request: Request) -> list[TokenEvent]:
    return [event async for event in engine.stream(request)]


async def _empty(engine: Engine) -> None:
    """Wait until the engine holds nothing."""
    while engine.has_work or engine.cache.sequences:
        await asyncio.sleep(0.001)
    assert engine.cache.free_pages == engine.cache.num_pages


def test_streams_beside_each_other_give_what_each_gives_alone(model: GPT) -> None:
    requests = [_request(seed, 5 + seed, num_return_sequences=1 + seed % 2) for seed in range(8)]

    async def main() -> None:
        async with AsyncEngine(Engine(model, max_seqs=4)) as engine:
            results = await asyncio.gather(*(_all(engine, request) for request in requests))
        for request, events in zip(requests, results, strict=True):
            expected = _alone(model, request)
            for copy in {event.copy for event in events}:
                found = [(e.copy, e.token, e.logprob) for e in events if e.copy == copy]
                assert found == [event for event in expected if event[0] == copy]
            assert len({event.request for event in events}) == 1
            assert events[-1].finish_reason == "length"

    _run(main)


def test_a_consumer_that_goes_away_leaves_nothing(model: GPT) -> None:
    async def main() -> None:
        inner = Engine(model, max_seqs=2)
        async with AsyncEngine(inner) as engine:
            # One breaks, one is cancelled, one is closed, one never begins, one fails.
            async for _ in engine.stream(_request(0, 60)):
                break
            task = asyncio.create_task(_all(engine, _request(1, 60)))
            await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            stream = engine.stream(_request(2, 60))
            assert isinstance(await anext(stream), TokenEvent)
            await stream.aclose()
            engine.stream(_request(3, 60))
            with pytest.raises(ZeroDivisionError):
                async for _ in engine.stream(_request(4, 60)):
                    _ = 1 / 0
            gc.collect()
            await _empty(inner)
            assert engine._worker._streams == {}
            # It goes on to serve.
            assert len(await _all(engine, _request(5, 3))) == 3

    _run(main)


def test_a_request_that_is_refused_is_its_callers_alone(model: GPT) -> None:
    async def main() -> None:
        async with AsyncEngine(Engine(model)) as engine:
            good = asyncio.create_task(_all(engine, _request(0)))
            with pytest.raises(ValueError, match="prompt holds 31"):
                await _all(engine, Request(prompt=[31]))
            assert len(await good) == 12

    _run(main)


def test_a_step_that_fails_is_told_to_every_stream(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        inner = Engine(model)
        async with AsyncEngine(inner) as engine:
            streams = [engine.stream(_request(seed, 60)) for seed in range(3)]
            for stream in streams:
                await anext(stream)
            plain, failed = inner.step, threading.Event()

            def step() -> list[TokenEvent]:
                if failed.is_set():
                    return plain()
                failed.set()
                raise RuntimeError("the device is gone")

            monkeypatch.setattr(inner, "step", step)
            for stream in streams:
                with pytest.raises(RuntimeError, match="AsyncEngine: the device is gone"):
                    async for _ in stream:
                        pass
            await _empty(inner)
            assert len(await _all(engine, _request(5, 3))) == 3

    _run(main)


def test_close_ends_what_runs_and_takes_no_more(model: GPT) -> None:
    async def main() -> None:
        inner = Engine(model)
        engine = AsyncEngine(inner)
        stream = engine.stream(_request(0, 60))
        await anext(stream)
        await engine.close()
        assert not engine._worker._thread.is_alive()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            async for _ in stream:
                pass
        with pytest.raises(RuntimeError, match="the engine is closed"):
            await _all(engine, _request(1))
        assert inner.cache.free_pages == inner.cache.num_pages
        await engine.close()

    _run(main)


def test_the_thread_ends_with_its_owner(model: GPT) -> None:
    engine = AsyncEngine(Engine(model))
    thread = engine._worker._thread
    del engine
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_no_thread_is_left_when_the_interpreter_goes(model: GPT) -> None:
    engine = AsyncEngine(Engine(model))
    async_engine._end_all()
    assert not engine._worker._thread.is_alive()


def test_a_closed_event_loop_is_a_consumer_that_went_away(model: GPT) -> None:
    inner = Engine(model)
    engine = AsyncEngine(inner)

    async def begin() -> None:
        await anext(engine.stream(_request(0, 60)))

    async def main() -> None:
        await _empty(inner)
        assert len(await _all(engine, _request(1, 4))) == 4
        await engine.close()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    _run(main)


def test_a_reader_takes_events_in_batches(model: GPT) -> None:
    async def main() -> None:
        async with AsyncEngine(Engine(model)) as engine:
            with engine.open(_request(1, 30)) as events:
                batches = []
                while batch := await events.read(within=60, tokens=8):
                    batches.append(batch)
            found = [(event.copy, event.token, event.logprob) for batch in batches for event in batch]
            assert found == _alone(model, _request(1, 30))
            # The first at once; then at least eight, or all the rest.
            assert all(len(batch) >= 8 for batch in batches[1:-1])
            with engine.open(_request(1, 60)) as events:
                await events.read()
                events.cancel()
                last: list[TokenEvent] = []
                while batch := await events.read():
                    last = batch
                assert last[-1].finish_reason in ("cancelled", "length")

    _run(main)


def test_a_reader_gives_what_there_is_when_it_has_waited_long_enough(model: GPT) -> None:
    async def main() -> None:
        async with AsyncEngine(Engine(model)) as engine:
            with engine.open(_request(1, 60)) as events:
                count = 0
                while batch := await events.read(within=0.001, tokens=1000):
                    count += len(batch)
                assert count == 60

    _run(main)


def test_a_bad_request_is_refused_where_it_is_opened(model: GPT) -> None:
    async def main() -> None:
        async with AsyncEngine(Engine(model)) as engine:
            with pytest.raises(ValueError, match="token ids from 0 to 30"):
                engine.open(Request(prompt=[31]))

    _run(main)
