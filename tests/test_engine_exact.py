"""Exact under load: whatever happens around a request, its tokens are the bits that it gets alone."""

from __future__ import annotations

import random
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from gptkern import GPT, GPTConfig, ops
from gptkern.engine import engine as engine_module
from gptkern.engine.beam import BeamSearch
from gptkern.engine.engine import Engine
from gptkern.engine.executors import choose, cpu, prompt
from gptkern.engine.executors.torch import TorchExecutor
from gptkern.engine.request import Request, TokenEvent
from gptkern.ops import _dispatch

CONFIG = GPTConfig(vocab_size=23, n_positions=72, n_layer=2, n_head=2, n_embd=12, initializer_range=0.5)
# Small, so that prompts of this model have several units, and short ones at their ends.
UNIT, SHORT = 8, 3
# What each copy of a request has made: (tokens, log-probabilities, reason).
Made = dict[int, tuple[list[int], list[float | None], str | None]]


restart = BeamSearch.restart


class Failure(Exception):
    """What is thrown into a step."""


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "UNIT_ON_CPU", UNIT)
    monkeypatch.setattr(cpu, "PROMPT_TOKENS_IN_BFLOAT16", SHORT)
    monkeypatch.setattr(cpu, "FEW_WEIGHTS", 0)
    # As on a processor that has no products of bfloat16.
    monkeypatch.setattr(cpu, "PRODUCTS_OF_BFLOAT16", "")


def _model(dtype: torch.dtype, layers: int, seed: int) -> GPT:
    torch.manual_seed(3)
    kind = "openai-gpt" if seed % 3 == 2 else "gpt2"
    model = GPT(CONFIG.replace(n_layer=layers, model_type=kind)).to(dtype).eval()
    with torch.no_grad():
        # It repeats itself now and then, so that drafts hold.
        for name, parameter in model.named_parameters():
            if "c_proj" in name:
                parameter.mul_(0.3)
    return model


def _requests(rng: random.Random, most_new: int, count: int) -> list[Request]:
    """Prompts that often begin alike, with all kinds of options."""
    stems = [[rng.randrange(CONFIG.vocab_size) for _ in range(40)] for _ in range(3)]
    motif = [4, 7, 9] * 13
    requests = []
    for seed in range(count):
        stem = rng.choice([*stems, motif])
        prompt = [*stem[: rng.choice([0, 8, 11, 16, 24, 34, 39])], rng.randrange(CONFIG.vocab_size)]
        options: dict[str, Any] = {"max_new_tokens": rng.randint(1, most_new), "seed": seed % 5}
        options["do_sample"] = rng.random() < 0.6
        if rng.random() < 0.3 and options["do_sample"]:
            options |= {"top_p": 0.8, "top_k": 9, "num_return_sequences": rng.randint(1, 3)}
        if rng.random() < 0.4:
            options["speculate"] = rng.randint(1, 5)
        if rng.random() < 0.2:
            options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.2}
        if rng.random() < 0.2:
            options["no_repeat_ngram_size"] = 2
            options.pop("speculate", None)
        if rng.random() < 0.3:
            options["eos_token_id"] = rng.randrange(CONFIG.vocab_size)
        request = Request(prompt=prompt, options=options, logprobs=0)
        requests.append(_searching(rng, request) if rng.random() < 0.25 else request)
    return requests


def _searching(rng: random.Random, request: Request) -> Request:
    """The request as a beam search."""
    idle = {"speculate", "do_sample", "top_p", "top_k", "num_return_sequences"}
    options = {name: value for name, value in request.options.items() if name not in idle}
    options |= {"num_beams": rng.randint(2, 3), "num_return_sequences": rng.randint(1, 2)}
    options |= {
        "early_stopping": rng.choice([True, False, "never"]),
        "length_penalty": rng.choice([0.5, 1.5]),
    }
    return replace(request, options=options, logprobs=None)


def _pages(request: Request, page_size: int) -> int:
    """The pages that a request may need when it is alone."""
    length = len(request.prompt)
    shared, whole = length // page_size, -(-(length + request.options["max_new_tokens"]) // page_size)
    return shared + request.options.get("num_beams", 1) * (whole - shared)


def _collect(made: Made, event: TokenEvent) -> None:
    tokens, logprobs, reason = made.setdefault(event.copy, ([], [], None))
    assert reason is None, "an event after the last"
    if event.token is not None:
        tokens.append(event.token)
        logprobs.append(event.logprob if event.score is None else event.score)
    made[event.copy] = tokens, logprobs, event.finish_reason


def _alone(model: GPT, request: Request) -> Made:
    options = {name: value for name, value in request.options.items() if name != "speculate"}
    engine = Engine(model, max_seqs=3, prefix_cache=False)
    engine.add(replace(request, options=options))
    made: Made = {}
    while engine.has_work:
        for event in engine.step():
            _collect(made, event)
    return made


@dataclass
class Counts:
    """What the schedules of one test met."""

    preempted: int = 0
    searches: int = 0
    begun_anew: int = 0
    found: int = 0
    accepted: int = 0
    cut_short: int = 0
    failed: int = 0
    whole: int = 0


class Schedules:
    """Random schedules of one model's requests."""

    def __init__(self, model: GPT, seed: int, most_new: int, requests: int) -> None:
        self.model, self.rng = model, random.Random(seed)
        self.requests = _requests(self.rng, most_new, requests)
        self.expected: dict[int, Made] = {}
        self.counts = Counts()
        # Some go on where an earlier one ended, as a chat does: what was generated there is a prompt now.
        self.earlier: dict[int, int] = {}
        for index in range(0, requests, 3):
            earlier = self.requests[index]
            prompt = [*earlier.prompt, *self.expect(index)[0][0], 5]
            if len(prompt) <= CONFIG.n_positions - most_new:
                self.earlier[len(self.requests)] = index
                self.requests.append(replace(earlier, prompt=prompt))

    def expect(self, index: int) -> Made:
        if index not in self.expected:
            self.expected[index] = _alone(self.model, self.requests[index])
        return self.expected[index]

    def run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One schedule, checked."""
        rng = self.rng
        monkeypatch.setattr(engine_module, "AHEAD_ON", rng.choice([("cuda",), ("cuda", "cpu")]))
        engine = Engine(
            self.model,
            max_seqs=rng.randint(3, 6),
            page_size=rng.choice([2, 3, 4, 8, 16]),
            # From room for a short request alone to room for all.
            cache_tokens=rng.choice([32, 48, 72, 120, 500]),
            prefill_chunk=rng.choice([1, 8, 13, 48]),
            prefix_cache=rng.random() < 0.7,
        )
        begun: dict[int, int] = {}
        made: dict[int, Made] = defaultdict(dict)
        pages, size = engine.cache.num_pages, engine.cache.page_size
        fit = [index for index, request in enumerate(self.requests) if _pages(request, size) <= pages]
        waiting = rng.choices(fit, k=rng.randint(1, 8))
        for index in self.earlier.keys() & set(waiting):
            if self.earlier[index] not in fit:
                continue
            waiting.insert(waiting.index(index) + 1, self.earlier[index])
        self._watch_prefixes(engine)
        self._watch_searches(monkeypatch)
        if rng.random() < 0.3:
            self._let_fail(engine)
        while waiting or engine.has_work:
            for _ in range(min(rng.choice([0, 0, 1, 1, 3]), len(waiting))):
                if any(engine.has(n) for n, index in begun.items() if index == self.earlier.get(waiting[-1])):
                    break
                index = waiting.pop()
                deadline = 1e-9 if rng.random() < 0.05 else None
                request = replace(self.requests[index], priority=rng.randint(0, 1), deadline=deadline)
                begun[engine.add(request)] = index
            if begun and rng.random() < 0.05:
                engine.cancel(rng.choice(list(begun)))
            with suppress(Failure):
                for event in engine.step():
                    _collect(made[event.request], event)
                    self.counts.accepted += event.accepted
        self.counts.preempted += engine.load.preemptions
        self._check(made, begun)
        assert engine.cache.sequences == []
        assert engine.cache.free_pages == engine.cache.num_pages
        engine.close()

    def _watch_prefixes(self, engine: Engine) -> None:
        begin = engine.cache.begin

        def counted(*args: Any, **kwargs: Any) -> tuple[int, int]:
            sequence, held = begin(*args, **kwargs)
            self.counts.found += held > 0
            return sequence, held

        engine.cache.begin = counted  # type: ignore[method-assign]

    def _watch_searches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def counted(search: BeamSearch) -> None:
            self.counts.begun_anew += bool(search.running)
            restart(search)

        monkeypatch.setattr(BeamSearch, "restart", counted)

    def _let_fail(self, engine: Engine) -> None:
        draw = engine._sampler.draw

        def method(*args: Any) -> Any:
            drawn = draw(*args)
            if self.rng.random() < 0.1:
                self.counts.failed += 1
                raise Failure
            return drawn

        engine._sampler.draw = method  # type: ignore[method-assign]

    def _check(self, made: dict[int, Made], begun: dict[int, int]) -> None:
        assert set(made) == set(begun)
        for number, index in begun.items():
            expected = self.expect(index)
            assert set(made[number]) == set(expected)
            for copy, (tokens, logprobs, reason) in made[number].items():
                whole_tokens, whole_logprobs, whole_reason = expected[copy]
                assert tokens == whole_tokens[: len(tokens)]
                assert logprobs == whole_logprobs[: len(tokens)]
                if reason in ("cancelled", "deadline"):
                    self.counts.cut_short += 1
                else:
                    assert (len(tokens), reason) == (len(whole_tokens), whole_reason)
                    self.counts.whole += 1
                    self.counts.searches += "num_beams" in self.requests[index].options


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without the interpreter."""
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)


def _run(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    seed: int,
    count: int,
    executor: str,
    kernels: AbstractContextManager[Any] | None = None,
) -> Counts:
    if executor == "torch":
        # Where another would serve, as for a model that carries a hook.
        monkeypatch.setattr(choose, "EXECUTORS", (TorchExecutor,))
    # Interpreted kernels take seconds a pass.
    layers, most_new, requests = (2, 16, 24) if kernels is None else (1, 3, 5)
    with kernels or nullcontext():
        schedules = Schedules(_model(dtype, layers, seed), seed, most_new, requests)
        assert Engine(schedules.model).executors.decode.name == executor
        for _ in range(count):
            schedules.run(monkeypatch)
    return schedules.counts


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
@pytest.mark.parametrize(
    ("dtype", "executor"),
    [(torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "torch")],
    ids=str,
)
def test_random_schedules(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, executor: str) -> None:
    counts = _run(monkeypatch, dtype, 1, 25, executor)
    assert counts.preempted and counts.found and counts.cut_short and counts.failed and counts.whole > 40
    assert counts.searches > 10 and counts.begun_anew
    assert counts.accepted or executor == "torch"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
@pytest.mark.parametrize(
    ("dtype", "executor"),
    [
        (torch.float32, "cpu"),
        (torch.bfloat16, "cpu"),
        (torch.float64, "torch"),
        (torch.float32, "torch"),
        (torch.float16, "torch"),
        (torch.bfloat16, "torch"),
    ],
    ids=str,
)
def test_five_hundred_schedules(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, executor: str) -> None:
    for seed in range(2, 12):
        _run(monkeypatch, dtype, seed, 50, executor)


@pytest.mark.slow
@pytest.mark.kernels
def test_schedules_with_the_kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    with device:
        counts = _run(monkeypatch, torch.float32, 1, 6, "graph", ops.backend("kernel"))
    assert counts.whole > 4


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
@pytest.mark.parametrize(
    ("dtype", "found"), [(torch.float32, 50), (torch.bfloat16, 40), (torch.float64, 40)], ids=str
)
def test_a_prefix_that_is_found_changes_no_bit(dtype: torch.dtype, found: int) -> None:
    model = _model(dtype, 2, 0)
    engine = Engine(model, page_size=10)
    held: list[int] = []
    begin = engine.cache.begin

    def noted(*args: Any, **kwargs: Any) -> tuple[int, int]:
        sequence, tokens = begin(*args, **kwargs)
        held.append(tokens)
        return sequence, tokens

    engine.cache.begin = noted  # type: ignore[method-assign]
    opening = [1 + i * 7 % 22 for i in range(50)]
    for tail in ([3], [5, 9, 11], [4] * 12):
        request = Request(prompt=opening + tail, options={"max_new_tokens": 5}, logprobs=0)
        engine.add(request)
        made: Made = {}
        while engine.has_work:
            for event in engine.step():
                _collect(made, event)
        assert made == _alone(model, request)
    assert held == [0, found, found]
