"""What a timed call finds, and what it has computed when the timing is over."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptkern.bench import environment, results, suites, tables, timing
from gptkern.bench.ceilings import Ceilings
from gptkern.bench.problem import TOLERANCE, Problem
from gptkern.bench.run import Results, Row, _input_sets, run
from gptkern.bench.suites import train_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CEILINGS = Ceilings(copy=1e10, matmul={"float32": 1e11, "bfloat16": 1e11, "float16": 1e11})
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "xeon-1-thread" / "results.json"


def _doubling(ours: Any, moved: float = 1e9, **fields: Any) -> Problem:
    """Twice a vector, by the provider ``ours``."""
    return Problem(
        "doubles",
        "64",
        torch.float32,
        lambda device: (torch.rand(64, device=device),),
        {"gptkern": ours, "eager": lambda x: 2 * x},
        lambda x: 2 * x,
        bytes_moved=moved,
        **fields,
    )


def _rows(problem: Problem) -> list[Row]:
    return run([problem], CPU, CEILINGS, rounds=2, samples=2).rows


class _Tiring:
    """Right at first; from the third call on it is not. ``restart`` begins anew."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * x if self.calls < 3 else 2.1 * x

    def restart(self, name: str) -> None:
        assert name in ("gptkern", "eager")
        self.calls = 0


def _writing(x: torch.Tensor) -> torch.Tensor:
    out = 2 * x
    x += 1
    return out


@pytest.mark.parametrize("ours", [_Tiring(), _writing])
def test_times_of_a_result_that_goes_wrong_are_dropped(ours: Any) -> None:
    row = _rows(_doubling(ours))[0]
    assert row.error == 0.0
    assert row.error_after is not None and row.error_after > TOLERANCE[torch.float32]
    assert row.problem.startswith("wrong after it was timed: relative error ")
    assert not row.rounds and row.seconds is None


def test_a_result_that_stays_right_keeps_its_times() -> None:
    for row in _rows(_doubling(lambda x: x + x, moved=32 << 20)):  # two input sets
        assert (row.problem, row.error, row.error_after) == ("", 0.0, 0.0)
        assert len(row.rounds) == 2


def test_state_is_taken_back_before_the_last_check() -> None:
    tiring = _Tiring()
    row = _rows(_doubling(tiring, restart=tiring.restart))[0]
    assert (row.problem, row.error_after, len(row.rounds)) == ("", 0.0, 2)


def test_a_check_that_fails_says_why() -> None:
    def restart(name: str) -> None:
        raise RuntimeError(f"no way back for {name}")

    row = _rows(_doubling(lambda x: 2 * x, restart=restart))[0]
    assert row.problem == "failed: RuntimeError: no way back for gptkern"
    assert not row.rounds


@pytest.mark.parametrize("name", ["decode_step", "sample", "train_step"])
def test_suites_with_state_are_checked_after_timing(name: str) -> None:
    problem = next(iter(suites.problems(name, CPU, quick=True)))
    for row in _rows(problem):
        assert row.problem == "" and row.rounds, row.problem
        assert row.error_after is not None and row.error_after <= TOLERANCE[problem.dtype]


def test_logits_of_a_longer_context_are_not_those_of_the_reference() -> None:
    problem = next(iter(suites.problems("decode_step", CPU, quick=True)))
    problem.restart = None
    assert all(row.problem.startswith("wrong after it was timed") for row in _rows(problem))


def test_a_training_step_is_taken_back_to_the_first_weights() -> None:
    problem = next(train_step.problems(CPU, quick=True))
    inputs = problem.inputs(CPU)
    step = problem.providers["gptkern"]
    first = step(*inputs)
    assert not torch.equal(step(*inputs), first)
    assert problem.restart is not None
    problem.restart("gptkern")
    assert torch.equal(step(*inputs), first)


def _gpu(monkeypatch: pytest.MonkeyPatch, l2: int, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=l2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))


@pytest.mark.parametrize(
    ("moved", "free", "sets"),
    [
        (25e6, 80e9, 4),  # twice 50 MB of L2
        (1e6, 80e9, 8),
        (1e9, 80e9, 2),
        (25e6, 200e6, 2),  # a quarter of it
        (1e9, 1e9, 1),
        (0.0, 80e9, 1),
    ],
)
def test_a_gpus_input_sets_are_more_than_l2_and_fit(
    monkeypatch: pytest.MonkeyPatch, moved: float, free: float, sets: int
) -> None:
    _gpu(monkeypatch, 50_000_000, int(free))
    assert _input_sets(_doubling(None, moved), CUDA) == sets
    assert _input_sets(_doubling(None, moved, backward=True), CUDA) == 1


def test_a_cpus_input_sets_are_as_before() -> None:
    assert [_input_sets(_doubling(None, moved), CPU) for moved in (1e6, 32 << 20, 1e9)] == [4, 2, 1]


def test_l2_is_emptied_between_calls_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def noted(what: str) -> Callable[..., None]:
        return lambda *_: seen.append(what)

    def event(enable_timing: bool) -> Any:
        assert enable_timing
        return SimpleNamespace(record=noted("event"), elapsed_time=lambda end: 2.0)

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "synchronize", noted("wait"))
    monkeypatch.setattr(timing, "_persisting_l2_reset", lambda: lambda: seen.append("reset") or 0)
    monkeypatch.setattr(timing, "_flush_buffer", lambda: SimpleNamespace(amax=noted("flush")))
    assert timing.sample([noted("a"), noted("b")], CUDA, 3, 0.0) == [2e-3] * 3
    before = ["wait", "reset", "flush", "event"]
    assert seen == [*before, "a", "event", *before, "b", "event", *before, "a", "event", "wait"]


def test_the_driver_takes_back_what_l2_was_asked_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [0, 801]
    driver = SimpleNamespace(cuCtxResetPersistingL2Cache=lambda: codes.pop(0))
    monkeypatch.setattr(timing, "_persisting_l2_reset", timing._persisting_l2_reset.__wrapped__)
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    assert [timing.reset_persisting_l2() for _ in range(2)] == ["", "CUDA error 801"]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert environment._persisting_l2() == (
        "not reset: the driver's library has no cuCtxResetPersistingL2Cache"
    )

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert timing.reset_persisting_l2()


def test_results_of_before_are_read_and_new_ones_name_the_reset() -> None:
    kept = results.load(RESULTS)
    assert kept.rows and all(row.error_after is None for row in kept.rows)
    assert "Persisting" not in tables.markdown(kept)
    told = Results(
        kept.environment | {"persisting_l2": "not reset: CUDA error 801"}, kept.ceilings, kept.rows
    )
    assert "Persisting lines of L2: not reset: CUDA error 801." in tables.markdown(told)
