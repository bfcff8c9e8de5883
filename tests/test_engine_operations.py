"""Random operations on an engine, failures among them: every page and row comes back, every request ends."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from gptkern import GPT, GPTConfig
from gptkern.engine import engine as engine_module
from gptkern.engine.engine import Engine
from gptkern.engine.request import Request, TokenEvent
from gptkern.engine.scheduler import Row
from gptkern.ops import _dispatch
from gptkern.tokenizer import Tokenizer

CONFIG = GPTConfig(vocab_size=13, n_positions=32, n_layer=1, n_head=1, n_embd=8, initializer_range=0.5)


class Failure(Exception):
    """What is thrown in."""


class Operations:
    """An engine with a tiny pool, and who was added to it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(0)
        self.rng = random.Random(seed)
        self.model = GPT(CONFIG).eval()
        self.engine = Engine(
            self.model, max_seqs=4, page_size=2, cache_tokens=36, prefill_chunk=4, prefix_cache=True
        )
        self.tokenizer = Tokenizer.characters({c: i for i, c in enumerate("abcdefghijklm")})
        self.copies: dict[int, int] = {}
        self.prompts: dict[int, list[int]] = {}
        self.ended: Counter[tuple[int, int]] = Counter()
        self.failures = 0
        self.failing: Callable[[], None] = lambda: None
        executors = self.engine.executors
        for owner, name in (
            (executors.decode, "forward"),
            (executors.prefill, "forward"),
            (self.engine._sampler, "draw"),
            (self.engine._scheduler, "computed"),
            (self.engine._scheduler, "plan"),
        ):
            self._wrap(owner, name)

    def _wrap(self, owner: Any, name: str) -> None:
        """Let a method fail now and then, before or after it has done its work."""
        real = getattr(owner, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            self.failing()
            result = real(*args, **kwargs)
            self.failing()
            return result

        setattr(owner, name, method)

    def _maybe_fail(self) -> None:
        if self.rng.random() < 0.02:
            self.failures += 1
            raise Failure

    def operate(self, throwing: bool) -> None:
        rng, roll = self.rng, self.rng.random()
        if roll < 0.25 and len(self.copies) - len({n for n, _ in self.ended}) < 8:
            self._add()
        elif roll < 0.3 and self.copies:
            self.engine.cancel(rng.choice(list(self.copies)))
        elif roll < 0.31:
            with torch.no_grad():
                self.model.lm_head.weight.add_(0.0)
        else:
            self.failing = self._maybe_fail if throwing else lambda: None
            with suppress(Failure):
                self.take(self.engine.step())
            self.check()

    def _add(self) -> None:
        rng = self.rng
        options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 12), "seed": rng.randrange(9)}
        copies = rng.choice([1, 1, 1, 2, 3])
        if rng.random() < 0.2:
            options |= {"num_beams": rng.randint(max(copies, 2), 3), "num_return_sequences": copies}
            options |= {"max_new_tokens": rng.randint(1, 5), "early_stopping": rng.random() < 0.5}
        elif copies > 1 or rng.random() < 0.5:
            options |= {"do_sample": True, "num_return_sequences": copies}
        if rng.random() < 0.3 and "num_beams" not in options:
            options["speculate"] = 3
        if rng.random() < 0.2:
            options["stop_strings"] = "abc"
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 16))]
        deadline = 1e-6 if rng.random() < 0.05 else None
        request = Request(prompt=prompt, options=options, priority=rng.randint(0, 1), deadline=deadline)
        number = self.engine.add(request, self.tokenizer)
        self.copies[number], self.prompts[number] = copies, prompt

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            assert not self.ended[event.request, event.copy], "an event after the last"
            if event.finish_reason is not None:
                self.ended[event.request, event.copy] += 1

    def check(self) -> None:
        """Count every page by who holds it, and every sequence by its row."""
        engine, cache = self.engine, self.engine.cache
        rows = [row for row in engine._live.rows if row.sequence is not None]
        assert sorted(cache.sequences) == sorted(self._sequence(row) for row in rows)
        held = Counter(page for sequence in cache.sequences for page in cache.pages(sequence))
        assert [cache._pool.holders(page) for page in range(cache.num_pages)] == [
            held[page] for page in range(cache.num_pages)
        ]
        assert cache.free_pages == cache.num_pages - len(held)

    def _sequence(self, row: Row) -> int:
        assert row.sequence is not None
        return row.sequence

    def drain(self) -> None:
        self.failing = lambda: None
        while self.engine.has_work:
            self.take(self.engine.step())
        self.check()
        expected = {(number, copy) for number, copies in self.copies.items() for copy in range(copies)}
        assert set(self.ended) == expected
        assert self.engine.cache.sequences == []
        assert self.engine.cache.free_pages == self.engine.cache.num_pages
        self.engine.cache.forget_prefixes()
        assert self.engine.cache._pool.idle == 0


def _operate(monkeypatch: pytest.MonkeyPatch, seed: int, count: int, throwing: bool) -> Operations:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    operations = Operations(seed)
    for number in range(count):
        ahead = ("cuda", "cpu") if number // 50 % 2 else ("cuda",)
        if operations.engine._launched is None:
            monkeypatch.setattr(engine_module, "AHEAD_ON", ahead)
        operations.operate(throwing)
    operations.drain()
    return operations


@pytest.mark.parametrize("throwing", [False, True])
def test_everything_comes_back(monkeypatch: pytest.MonkeyPatch, throwing: bool) -> None:
    operations = _operate(monkeypatch, 0, 700, throwing)
    assert operations.engine.load.preemptions > 5
    assert (operations.failures > 10) == throwing


@pytest.mark.slow
@pytest.mark.parametrize("throwing", [False, True])
def test_ten_thousand_operations(monkeypatch: pytest.MonkeyPatch, throwing: bool) -> None:
    _operate(monkeypatch, 1, 10_000, throwing)
