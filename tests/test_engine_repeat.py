"""The engine's last pass run again: tokens are those of passes chosen anew, whatever comes between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gptkern import GPT, Engine, GPTConfig, Request, backend
from gptkern.engine import engine as module
from gptkern.engine.repeat import Repeat
from gptkern.engine.request import TokenEvent
from gptkern.ops import _dispatch

PAGE = 16
CONFIG = GPTConfig(
    vocab_size=61, n_positions=64, n_layer=2, n_head=2, n_embd=32, initializer_range=0.4, eos_token_id=None
)
SAMPLED = {"do_sample": True, "top_k": 20, "top_p": 0.9, "seed": 4}
Between = Callable[[Engine, int], Any]


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The way of a CPU without the interpreter."""
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with backend("auto"):
        yield


def _events(between: Between, requests: list[dict[str, Any]], **given: Any) -> list[TokenEvent]:
    """The events of some requests; ``between`` is called before each step."""
    torch.manual_seed(3)
    engine = Engine(GPT(CONFIG).eval(), page_size=PAGE, **given)
    for number, options in enumerate(requests):
        prompt = range(3 + number, 8 + 2 * number)
        engine.add(Request(prompt=prompt, logprobs=options.pop("logprobs", None), options=options))
    events: list[TokenEvent] = []
    for step in range(200):
        if not engine.has_work:
            return events
        between(engine, step)
        events += engine.step()
    raise AssertionError("requests did not end")


def _nothing(engine: Engine, step: int) -> None: ...


def _another_joins(engine: Engine, step: int) -> None:
    if step == 5:
        engine.add(Request(prompt=[7] * 6, options=SAMPLED | {"max_new_tokens": 9}))


def _one_is_cancelled(engine: Engine, step: int) -> None:
    if step == 6:
        engine.cancel(1)


def _a_weight_is_replaced(engine: Engine, step: int) -> None:
    if step == 5:
        layer = engine.model.transformer.h[1].mlp.c_fc
        layer.weight = torch.nn.Parameter(layer.weight.flip(0))


def _a_weight_is_written(engine: Engine, step: int) -> None:
    if step == 5:
        engine.model.transformer.h[1].mlp.c_fc.weight.data.neg_()


def _a_module_is_hooked(engine: Engine, step: int) -> None:
    if step == 5:
        engine.model.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: out * 2)


def _autocast_comes_on(engine: Engine, step: int) -> None:
    torch.set_autocast_enabled("cpu", 5 <= step < 7)


def _a_step_fails(engine: Engine, step: int) -> None:
    if step == 5:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="planted"):
            patch.setattr(module.time, "monotonic", _raise)
            engine.step()


def _raise() -> float:
    raise OSError("planted")


def _nobody_can_be_drawn_at_a_place(engine: Engine, step: int) -> None:
    # The three rows come there one after another, and fail alone.
    engine.model.transformer.wpe.weight.data[14] = float("nan")


@pytest.mark.filterwarnings("ignore:gptkern. decoding")
@pytest.mark.parametrize(
    "between",
    [
        *(_nothing, _another_joins, _one_is_cancelled, _a_weight_is_replaced, _a_weight_is_written),
        *(_a_module_is_hooked, _autocast_comes_on, _a_step_fails, _nobody_can_be_drawn_at_a_place),
    ],
)
def test_tokens_are_those_of_passes_chosen_anew(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    def requests() -> list[dict[str, Any]]:
        return [
            {"max_new_tokens": 30, "logprobs": 2},
            SAMPLED | {"max_new_tokens": 20},
            SAMPLED | {"max_new_tokens": 25, "repetition_penalty": 1.3},
        ]

    ran = []
    run = Repeat.run
    monkeypatch.setattr(Repeat, "run", lambda self: ran.append(1) or run(self))
    found = _events(between, requests())
    assert len(ran) >= 3
    monkeypatch.setattr(Repeat, "after", lambda *args: None)
    expected = _events(between, requests())
    assert [e._replace(error=None) for e in found] == [e._replace(error=None) for e in expected]
    assert [str(e.error) for e in found] == [str(e.error) for e in expected]
    torch.set_autocast_enabled("cpu", False)


def test_rows_that_wait_for_a_place_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def requests() -> list[dict[str, Any]]:
        return [SAMPLED | {"max_new_tokens": 12 + 3 * number} for number in range(5)]

    found = _events(_nothing, requests(), max_seqs=2)
    monkeypatch.setattr(Repeat, "after", lambda *args: None)
    assert found == _events(_nothing, requests(), max_seqs=2)


def test_a_deadline_ends_a_row_among_passes_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    engine = Engine(GPT(CONFIG).eval(), page_size=64)
    engine.add(Request(prompt=[1, 2], deadline=5.5, options={"max_new_tokens": 20}))
    for now[0] in (0.0, 1.0, 2.0, 3.0, 4.0):
        assert [event.finish_reason for event in engine.step()] == [None]
    assert engine._repeat is not None and engine._repeat.deadline == 5.5
    now[0] = 6.0
    assert [event.finish_reason for event in engine.step()] == ["deadline"]


def test_what_has_to_be_worked_out_for_each_token_is_not_repeated() -> None:
    options: dict[str, Any] = {"max_new_tokens": 20}
    for request in (
        Request(prompt=[1, 2], options=options | {"no_repeat_ngram_size": 2}),
        Request(prompt=[1, 2], options=options | {"speculate": 4}),
        Request(prompt=[1, 2], options=options | {"num_beams": 2}),
        Request(prompt=[1, 2], options=options, logits_processor=lambda ids, logits: logits),
        Request(prompt=[1, 2], options=options, stopping_criteria=lambda ids, scores: False),
    ):
        engine = Engine(GPT(CONFIG).eval())
        engine.add(request)
        for _ in range(6):
            engine.step()
        assert engine._repeat is None
