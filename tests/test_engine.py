"""The engine: what it refuses, how requests end, and that nothing is made twice."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from gptkern import GPT, GPTConfig
from gptkern.engine import engine as module
from gptkern.engine.engine import Engine
from gptkern.engine.executors import choose
from gptkern.engine.executors.graph import GraphExecutor, Graphs
from gptkern.engine.request import Request, TokenEvent
from gptkern.generate.engines import Engines
from gptkern.ops import _dispatch
from gptkern.tokenizer import Tokenizer

CONFIG = GPTConfig(
    vocab_size=61, n_positions=256, n_layer=2, n_head=2, n_embd=32, initializer_range=0.4, eos_token_id=0
)


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a CPU without the interpreter."""
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)


def make_model() -> GPT:
    torch.manual_seed(3)
    return GPT(CONFIG).eval()


def run(engine: Engine) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    return events


def asked(*prompt: int, **options: Any) -> Request:
    return Request(prompt=prompt, options={"max_new_tokens": 8, "eos_token_id": None} | options)


def test_events_are_the_tokens_of_generate() -> None:
    model = make_model()
    engine = Engine(model, max_seqs=4)
    numbers = [
        engine.add(asked(5, 6, 7)),
        engine.add(asked(9, do_sample=True, seed=4, num_return_sequences=2)),
    ]
    events = run(engine)
    rows: dict[tuple[int, int], list[int | None]] = {}
    for event in events:
        rows.setdefault((event.request, event.copy), []).append(event.token)
    greedy = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, eos_token_id=None)
    drawn = model.generate(
        torch.tensor([[9]]),
        max_new_tokens=8,
        eos_token_id=None,
        do_sample=True,
        seed=4,
        num_return_sequences=2,
    )
    assert isinstance(greedy, torch.Tensor)
    assert isinstance(drawn, torch.Tensor)
    assert rows[numbers[0], 0] == greedy[0, 3:].tolist()
    assert [rows[numbers[1], copy] for copy in (0, 1)] == drawn[:, 1:].tolist()
    assert [event.finish_reason for event in events if event.finish_reason] == ["length"] * 3
    assert engine.cache.sequences == []


def test_a_second_generate_allocates_no_cache_and_makes_no_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptkern.engine.executors.cpu import CpuExecutor

    made: list[str] = []
    for owner, name in ((module, "KVCache"), (module, "Executors")):
        real = getattr(owner, name)

        class Counted(real):  # type: ignore[misc, valid-type]
            pass

        def note(self: Any, *args: Any, _name: str = name, _real: Any = real, **kwargs: Any) -> None:
            made.append(_name)
            _real.__init__(self, *args, **kwargs)

        Counted.__init__ = note
        monkeypatch.setattr(owner, name, Counted)
    model, ids = make_model(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert CpuExecutor.serves(model, model.dtype) is None
    first = model.generate(ids, max_new_tokens=6)
    assert made == ["KVCache", "Executors"]
    for _ in range(3):
        assert torch.equal(model.generate(ids, max_new_tokens=6), first)
    model.generate(ids, max_new_tokens=5, num_beams=1)
    model.generate(ids[:1], max_new_tokens=6, do_sample=True, speculate=2, seed=1)
    assert made == ["KVCache", "Executors"]
    model.generate(ids.repeat(8, 1), max_new_tokens=100)
    assert made == ["KVCache", "Executors"] * 2
    model.generate(ids, max_new_tokens=6, num_beams=2)
    assert made == ["KVCache", "Executors"] * 2


def test_streams_that_are_open_at_once_do_not_meet() -> None:
    model = make_model()
    alone = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12)
    from gptkern import Tokenizer

    model.tokenizer = Tokenizer.bytes()
    one, two = (model.stream([5, 6, 7], max_new_tokens=12) for _ in range(2))
    next(one)
    next(two)
    list(one)
    del two
    assert isinstance(alone, torch.Tensor)
    assert one.completion.token_ids == alone[0, 3:].tolist()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: asked(61), "prompt holds 61; token ids from 0 to 60"),
        (lambda: asked(*range(1, 60), max_new_tokens=240), "at most 197 is possible here"),
        (lambda: asked(*[1] * 100, max_new_tokens=100), "need 4 pages of 64 tokens, the engine has 3"),
        (lambda: asked(5, do_sample=True, num_return_sequences=3), "the engine's max_seqs is 2"),
        (lambda: asked(5, stop_strings="a"), "stop_strings need a tokenizer"),
        (lambda: asked(5, kv_cache_dtype="fp8"), "kv_cache_dtype is 'fp8'; the engine's is 'auto'"),
        (lambda: asked(5, num_beams=3), "num_beams is 3, the engine's max_seqs is 2"),
        (lambda: asked(*[1] * 60, max_new_tokens=70, num_beams=2), "2 beams need 6 pages of 64 tokens"),
        (lambda: asked(5, temprature=1.0), "did you mean 'temperature'"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(request_: Any, message: str) -> None:
    engine = Engine(make_model(), max_seqs=2, cache_tokens=192)
    with pytest.raises((ValueError, TypeError), match=message):
        engine.add(request_())
    assert not engine.has_work


def test_a_request_that_fails_ends_alone() -> None:
    model = make_model()
    alone = Engine(model)
    alone.add(asked(5, 6, 7, max_new_tokens=12))
    expected = [event.token for event in run(alone)]
    engine = Engine(model)
    good, bad = engine.add(asked(5, 6, 7, max_new_tokens=12)), engine.add(asked(9))
    events = engine.step()
    (sequence,) = (row.sequence for row in engine._live[bad].rows)
    engine.cache.k[:, engine.cache.pages(sequence)[0], 0] = torch.nan  # type: ignore[arg-type]
    events += run(engine)
    assert [event.token for event in events if event.request == good] == expected
    (end,) = (event for event in events if event.request == bad and event.finish_reason)
    assert end.finish_reason == "error"
    assert "NaN" in str(end.error)
    assert engine.cache.free_pages == engine.cache.num_pages


def test_cancels_and_deadlines_end_a_request() -> None:
    engine = Engine(make_model(), max_seqs=2)
    one = engine.add(asked(5, max_new_tokens=100))
    late = engine.add(
        Request(prompt=[6], options={"max_new_tokens": 100, "eos_token_id": None}, deadline=1e-9)
    )
    waits = engine.add(asked(7, max_new_tokens=3))
    events = engine.step()
    engine.cancel(one)
    engine.cancel(one)
    engine.cancel(12345)
    events += run(engine)
    ends = {event.request: event.finish_reason for event in events if event.finish_reason}
    assert ends == {one: "cancelled", late: "deadline", waits: "length"}
    assert engine.cache.free_pages == engine.cache.num_pages


def test_two_threads_cannot_step_at_once() -> None:
    engine = Engine(make_model())
    engine.add(asked(5))
    inside, leave = threading.Event(), threading.Event()
    real = engine.executors.prefill.forward

    def slow(rows: Any) -> torch.Tensor:
        inside.set()
        leave.wait(30)
        return real(rows)

    engine.executors.prefill.forward = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=engine.step)
    thread.start()
    assert inside.wait(30)
    with pytest.raises(RuntimeError, match="another thread is in it"):
        engine.step()
    leave.set()
    thread.join()
    assert len(run(engine)) == 7


def test_weights_that_moved_are_told_at_the_next_step() -> None:
    model = make_model()
    engine = Engine(model)
    engine.add(asked(5))
    engine.step()
    model.bfloat16()
    with pytest.raises(RuntimeError, match="weights changed while generation was under way"):
        engine.step()


def test_a_closed_engine_takes_nothing() -> None:
    engine = Engine(make_model())
    engine.add(asked(5))
    engine.step()
    engine.close()
    assert engine.cache.free_pages == engine.cache.num_pages
    with pytest.raises(RuntimeError, match="closed"):
        engine.add(asked(5))
    with pytest.raises(RuntimeError, match="closed"):
        engine.step()


def test_an_engine_that_is_closed_during_a_step_gives_everything_back() -> None:
    engine = Engine(make_model())
    engine.add(asked(5))
    inside, leave = threading.Event(), threading.Event()
    real = engine.executors.prefill.forward
    events: list[TokenEvent] = []

    def slow(rows: Any) -> torch.Tensor:
        inside.set()
        leave.wait(30)
        return real(rows)

    engine.executors.prefill.forward = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: events.extend(engine.step()))
    thread.start()
    assert inside.wait(30)
    engine.close()
    leave.set()
    thread.join()
    assert len(events) == 1
    assert engine.cache.free_pages == engine.cache.num_pages and not engine.cache.sequences
    assert not engine.has_work


@pytest.mark.parametrize(
    "options",
    [
        {"max_seqs": 1.5},
        {"max_seqs": "3"},
        {"page_size": True},
        {"prefill_chunk": 512.0},
        {"prefill_chunk": 0},
        {"memory_bytes": 1e9},
        {"cache_tokens": 64.0},
        {"prefix_cache": "no"},
        {"kv_cache_dtype": "int3"},
    ],
)
def test_what_an_engine_is_made_of_is_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=f"Engine: {name} is "):
        Engine(make_model(), **options)


def test_a_page_may_be_larger_than_what_one_pass_takes_of_a_prompt() -> None:
    expected = Engine(make_model())
    engine = Engine(make_model(), page_size=4096, prefill_chunk=1)
    for each in (expected, engine):
        each.add(asked(*range(1, 40)))
    assert [event.token for event in run(engine)] == [event.token for event in run(expected)]


def test_text_in_place_of_a_model_or_a_request_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="Engine: model is str; a GPT is needed"):
        Engine("gpt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Engine\.add: request is str; a Request is needed"):
        Engine(make_model()).add("ROMEO:")  # type: ignore[arg-type]


def test_a_cancel_of_no_number_is_refused_and_ends_nothing() -> None:
    engine = Engine(make_model())
    engine.add(asked(5))
    with pytest.raises(TypeError, match="request is \\[0\\]"):
        engine.cancel([0])  # type: ignore[arg-type]
    assert len(run(engine)) == 8


def test_beams_of_a_kept_engine_follow_a_number_that_changed() -> None:
    model = make_model()
    options = {"max_new_tokens": 8, "num_beams": 2, "eos_token_id": None}
    ids = torch.tensor([[5, 6, 7]])
    before = model.generate(ids, **options)
    model.transformer.h[1].ln_2.eps = 30.0
    after = model.generate(ids, **options)
    model.engines.clear()
    expected = model.generate(ids, **options)
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_a_hook_is_called_at_every_token_of_a_prompt_that_came_before() -> None:
    model = make_model()
    seen: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda _, given, out: seen.append(given[0].shape[-2]))
    engine = Engine(model, page_size=2, prefill_chunk=2)
    for _ in range(2):
        engine.add(Request(prompt=[1, 2, 3, 4, 5], options={"max_new_tokens": 1}))
        run(engine)
    assert sum(seen) == 10


def test_pages_computed_under_autocast_are_not_found_without() -> None:
    model = make_model()
    engine, alone = (Engine(model, page_size=2, prefill_chunk=2) for _ in range(2))
    request = Request(prompt=[1, 2, 3, 4, 5], options={"max_new_tokens": 2}, logprobs=0)
    with torch.autocast("cpu", torch.bfloat16):
        engine.add(request)
        run(engine)
    for each in (engine, alone):
        each.add(request)
    found, expected = ([event.logprob for event in run(each)] for each in (engine, alone))
    assert found == expected


def test_pages_are_not_found_once_it_is_told_that_weights_changed() -> None:
    model = make_model()
    engine = Engine(model, page_size=2, prefill_chunk=2)
    request = Request(prompt=list(range(1, 30)), options={"max_new_tokens": 2}, logprobs=0)
    engine.add(request)
    run(engine)
    row = engine.model.transformer.wpe.weight.data[3]
    row[1] += 1  # one value, of which PyTorch counts nothing
    engine.weights_changed()
    alone = Engine(model, page_size=2, prefill_chunk=2)
    for each in (engine, alone):
        each.add(request)
    logprobs, expected = ([event.logprob for event in run(each)] for each in (engine, alone))
    assert logprobs == expected


def test_a_pass_that_raises_is_taken_again() -> None:
    model = make_model()
    engine = Engine(model)
    engine.add(asked(5, 6, 7))
    events = engine.step()
    engine.add(asked(9, 10))
    real, calls = engine.executors.prefill.forward, []

    def fails_once(rows: Any) -> torch.Tensor:
        calls.append(rows)
        if len(calls) == 1:
            raise MemoryError("once")
        return real(rows)

    engine.executors.prefill.forward = fails_once  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="once"):
        engine.step()
    events += run(engine)
    other = Engine(model)
    other.add(asked(5, 6, 7))
    other.add(asked(9, 10))
    expected = run(other)
    for number in (0, 1):
        assert [e.token for e in events if e.request == number] == [
            e.token for e in expected if e.request == number
        ]


def test_log_probabilities_of_the_prompt_and_of_the_likeliest_tokens() -> None:
    model = make_model()
    engine = Engine(model)
    prompt = [5, 6, 7, 5, 9]
    engine.add(Request(prompt=prompt, options={"max_new_tokens": 2}, logprobs=2, prompt_logprobs=3))
    events = run(engine)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    found = events[0].prompt_logprobs
    assert found is not None
    assert events[1].prompt_logprobs is None
    torch.testing.assert_close(
        torch.tensor([own for own, _ in found]), expected[range(4), prompt[1:]], atol=1e-5, rtol=1e-5
    )
    for place, (_, top) in enumerate(found):
        assert [token for token, _ in top] == expected[place].topk(3).indices.tolist()
    assert [token for token, _ in events[0].top_logprobs] == expected[-1].topk(2).indices.tolist()
    assert events[0].logprob == events[0].top_logprobs[0][1]
    (whole,) = model.score(prompt)
    torch.testing.assert_close(torch.tensor([own for own, _ in found]), torch.tensor(whole.logprobs))


def test_turns_of_a_conversation_compute_only_what_is_new() -> None:
    model = make_model()
    model.engines = Engines(keeps_prefixes=True)
    said = [1 + i * 7 % 60 for i in range(100)]
    model.generate(torch.tensor([said]), max_new_tokens=4)
    computed: list[int] = []
    with model.engines.engine(model, 1, 256, "auto") as engine:
        real = engine.executors.prefill.forward

        def counted(rows: Any) -> torch.Tensor:
            computed.append(sum(rows.counts))
            return real(rows)

        engine.executors.prefill.forward = counted  # type: ignore[method-assign]
    longer = torch.tensor([[*said, 5, 6, 7]])
    options = {"max_new_tokens": 20, "eos_token_id": None}
    found = model.generate(longer, **options)
    assert computed == [103 - 96, *[1] * 19]
    # ``generate`` gives the same, whether it keeps prefixes or not.
    assert torch.equal(found, make_model().generate(longer, **options))


class StandIn(Graphs):
    """CUDA graphs without CUDA: what was captured runs when it is replayed."""

    made: ClassVar[list[int]] = []

    def __init__(self, executor: GraphExecutor) -> None:
        self._executor, self._captured = executor, {}

    def clear(self) -> None:
        self._captured.clear()

    def _capture(self, rows: int) -> tuple[Any, torch.Tensor]:
        self.made.append(rows)
        out = torch.empty(rows, CONFIG.vocab_size)
        return SimpleNamespace(replay=lambda: out.copy_(self._executor.run(rows))), out


class Captured(GraphExecutor):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.graphs = StandIn(self)

    @staticmethod
    def serves(model: Any, dtype: torch.dtype) -> str | None:
        return None


def test_a_graph_is_captured_once_a_bucket_and_never_by_a_second_generate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StandIn, "made", [])
    model, ids = make_model(), torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    options = {"max_new_tokens": 9, "eos_token_id": None}
    expected = model.generate(ids, **options)
    monkeypatch.setattr(choose, "EXECUTORS", (Captured,))
    for ahead in ((), ("cpu",)):
        monkeypatch.setattr(module, "AHEAD_ON", ahead)
        for _ in range(3):
            assert torch.equal(model.generate(ids, **options), expected)
            assert torch.equal(model.generate(ids[:2], **options), expected[:2])
    assert sorted(StandIn.made) == [2, 4]
    model.generate(ids[:1], **options)
    assert sorted(StandIn.made) == [1, 2, 4]


@pytest.mark.parametrize("keeps_prefixes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
def test_a_model_that_generated_is_freed_without_the_garbage_collector(
    keeps_prefixes: bool, dtype: torch.dtype
) -> None:
    model = make_model().to(dtype)
    model.engines = Engines(keeps_prefixes)
    ids = torch.tensor([[5, 6, 7]])
    model.generate(ids, max_new_tokens=4)
    model.generate(ids, max_new_tokens=4, do_sample=True, seed=1, num_return_sequences=2)
    with model.engines.engine(model, 1, 64, "auto") as engine:
        held = [weakref.ref(each) for each in (model, model.lm_head.weight, engine, engine.cache.k)]
    del engine
    gc.disable()
    try:
        del model
        assert [reference() for reference in held] == [None] * 4
    finally:
        gc.enable()


def test_events_have_the_text_that_is_final_with_them() -> None:
    tokenizer = Tokenizer.characters({chr(65 + token): token for token in range(61)})
    engine = Engine(make_model())
    plain, whole, given = (
        engine.add(asked(5, 6, 7, max_new_tokens=12), used) for used in (None, tokenizer, tokenizer)
    )
    events = run(engine)
    tokens = [event.token for event in events if event.request == plain]
    assert [event.text for event in events if event.request == plain] == [""] * 12
    said = "".join(chr(65 + token) for token in tokens if token is not None)
    assert [event.text for event in events if event.request in (whole, given)] == [
        letter for letter in said for _ in range(2)
    ]
    # What may be the beginning of a stop string waits: for the stop string, or for the end.
    stopped = engine.add(asked(5, 6, 7, max_new_tokens=12, stop_strings=said[5:8]), tokenizer)
    cut = engine.add(asked(5, 6, 7, max_new_tokens=7, stop_strings=said[5:8]), tokenizer)
    events = run(engine)
    ends = [(event.request, event.finish_reason) for event in events if event.finish_reason]
    assert ends == [(cut, "length"), (stopped, "stop")]
    assert [event.text for event in events if event.request == cut] == [*said[:5], "", said[5:7]]
    assert "".join(event.text for event in events if event.request == stopped) == said[:5]


def test_an_engine_keeps_its_model() -> None:
    engine = Engine(make_model())
    gc.collect()
    engine.add(asked(5))
    assert len(run(engine)) == 8


@pytest.mark.timeout(60)
def test_a_stream_may_end_while_its_engine_is_chosen() -> None:
    """Garbage collection ends abandoned streams anywhere, in the same thread's choice of an engine too."""
    model = make_model()
    with model.engines.engine(model, 1, 64, "auto") as engine:
        pass
    with model.engines._lock:
        model.engines._leave(engine, model.engines._idle_key)
    assert model.engines._idle is engine
