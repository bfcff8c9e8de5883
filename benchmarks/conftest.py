"""The suites of ``gptkern.bench`` under pytest-benchmark: ``bench_<suite>.py`` gets the suite's cases.

    pytest benchmarks --benchmark-enable -n 0                       # everything
    pytest benchmarks/bench_layer_norm.py --benchmark-enable -n 0   # one suite

A case is one problem and one provider. Its result is compared with the float64 reference before it is
timed. ``GPTKERN_BENCH_FULL=1`` runs all shapes and compiled peers. `gptkern bench` is the same
measurement with ceilings, plots and comparison.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gptkern.bench import suites
from gptkern.bench.problem import TOLERANCE, Problem, Unavailable, call_of, error, expected_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK = os.environ.get("GPTKERN_BENCH_FULL", "0") != "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    suite = metafunc.module.__name__.rpartition(".")[2].removeprefix("bench_")
    cases = [
        pytest.param((problem, provider), id=f"{problem.name}/{provider}".replace(" ", "_"))
        for problem in suites.problems(suite, DEVICE, QUICK)
        for provider in problem.providers
    ]
    metafunc.parametrize("case", cases)


@dataclass
class Measure:
    """A function that checks one case, then times it."""

    problem: Problem
    provider: str
    benchmark: BenchmarkFixture

    def __call__(self) -> None:
        solve = self.problem.providers[self.provider]
        try:
            inputs = self.problem.inputs(DEVICE)
            off = error(self.problem, solve, inputs, expected_of(self.problem, inputs))
            call = call_of(self.problem, solve, inputs)
            call()
        except Unavailable as reason:
            pytest.skip(str(reason))
        assert off <= TOLERANCE[self.problem.dtype], f"relative error {off:.1e} against the reference"
        self.benchmark.group = self.problem.name
        self.benchmark.extra_info.update(bytes=self.problem.bytes_moved, flops=self.problem.flops, error=off)
        self.benchmark(_finished(call))


def _finished(call: Callable[[], object]) -> Callable[[], None]:
    """A function that runs ``call`` and waits until the device has finished."""

    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.fixture
def measure(case: tuple[Problem, str], benchmark: BenchmarkFixture) -> Measure:
    """The case of this test, ready to be called."""
    return Measure(*case, benchmark)
