"""Running problems: check each provider, time them in interleaved rounds, check what they then compute."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

from gptkern.bench import environment, timing
from gptkern.bench.ceilings import Ceilings
from gptkern.bench.problem import (
    TOLERANCE,
    Inputs,
    Problem,
    Unavailable,
    call_of,
    difference,
    error,
    expected_of,
)

FORMAT = 1
_CPU_CACHE_BYTES = 64 << 20
_MOST_INPUT_SETS = 4
_MOST_INPUT_SETS_ON_A_GPU = 8


@dataclass
class Row:
    """One problem solved by one provider.

    Attributes:
        rounds: Seconds of each sample, one list a round; empty where the provider failed.
        problem: Why there are no samples, "" where there are.
        error: Relative error against the float64 reference, before timing.
        error_after: The same after timing, None in results of before this was checked.
    """

    suite: str
    shape: str
    dtype: str
    backward: bool
    provider: str
    bytes_moved: float
    flops: float
    error: float | None = None
    problem: str = ""
    rounds: list[list[float]] = field(default_factory=list)
    error_after: float | None = None

    @property
    def key(self) -> tuple[str, str, str, bool, str]:
        """The fields that identify the row in another run."""
        return self.suite, self.shape, self.dtype, self.backward, self.provider

    @property
    def title(self) -> str:
        """The problem, for people."""
        return f"{self.suite} {self.shape} {self.dtype}" + (" backward" if self.backward else "")

    @property
    def samples(self) -> list[float]:
        """The samples of all rounds, in seconds."""
        return [seconds for round_ in self.rounds for seconds in round_]

    @property
    def seconds(self) -> float | None:
        """The median sample."""
        return median(self.samples) if self.rounds else None

    @property
    def spread(self) -> float | None:
        """Interquartile range over the median."""
        if len(self.samples) < 4:
            return None
        low, _, high = quantiles(self.samples, n=4)
        return (high - low) / median(self.samples)


@dataclass
class Results:
    """A whole run: where it was made, the ceilings, the rows."""

    environment: dict[str, Any]
    ceilings: Ceilings
    rows: list[Row]


class _Kept:
    """A call that is timed, and its last result."""

    def __init__(self, call: Callable[[], list[torch.Tensor]]) -> None:
        self._call = call
        self.last: list[torch.Tensor] = []

    def __call__(self) -> None:
        self.last = []  # its memory is the next result's, as in calls whose results are dropped
        self.last = self._call()


@dataclass
class _Ready:
    """A provider; with ``calls`` where it is to be timed, and then ``again``, its error after that."""

    row: Row
    calls: list[timing.Call] = field(default_factory=list)
    estimate: float = 0.0
    again: Callable[[], float] = lambda: math.inf


def run(
    problems: Sequence[Problem],
    device: torch.device,
    ceilings: Ceilings,
    *,
    rounds: int = 5,
    samples: int = 10,
    seconds: float = math.inf,
    progress: Callable[[str], None] = lambda _: None,
) -> Results:
    """Check, time, check again: ``rounds`` passes over a problem's providers in random order.

    Providers take turns sample by sample, so that a slow spell of the machine falls on all alike. A round
    is ``samples`` samples, fewer where a problem would take longer than about ``seconds``, at least one.
    """
    rows: list[Row] = []
    order = random.Random(0)
    for problem in problems:
        progress(problem.name)
        prepared = _prepare(problem, device)
        rows += [item.row for item in prepared]
        ready = [item for item in prepared if item.calls]
        turn = sum(timing.sample_seconds(item.estimate, device) for item in ready)
        affordable = min(samples, seconds / (rounds * turn)) if ready else 0
        for _ in range(rounds):
            _one_round(ready, device, max(1, int(affordable)), order)
        for item in ready:
            _check_again(item, problem, device)
    return Results(environment.describe(device), ceilings, rows)


def _one_round(ready: list[_Ready], device: torch.device, samples: int, order: random.Random) -> None:
    for item in ready:
        item.row.rounds.append([])
    for turn in range(samples):
        for item in order.sample(ready, len(ready)):
            calls = item.calls[turn % len(item.calls) :] + item.calls[: turn % len(item.calls)]
            item.row.rounds[-1] += timing.sample(calls, device, 1, item.estimate)


def _prepare(problem: Problem, device: torch.device) -> list[_Ready]:
    """Every provider, checked against one result of the reference, with its calls where it was right."""
    inputs = [problem.inputs(device) for _ in range(_input_sets(problem, device))]
    expected: list[torch.Tensor] | Exception
    try:
        expected = expected_of(problem, inputs[0])
    except Exception as reason:
        # A reference that does not fit into memory must not end an hour's run.
        expected = reason
    return [_prepare_provider(problem, name, device, inputs, expected) for name in problem.providers]


def _prepare_provider(
    problem: Problem,
    name: str,
    device: torch.device,
    inputs: list[Inputs],
    expected: list[torch.Tensor] | Exception,
) -> _Ready:
    kind = str(problem.dtype).removeprefix("torch.")
    row = Row(problem.suite, problem.shape, kind, problem.backward, name, problem.bytes_moved, problem.flops)
    provider = problem.providers[name]
    try:
        if isinstance(expected, Exception):
            raise expected
        row.error = error(problem, provider, inputs[0], expected)
        if not row.error <= TOLERANCE[problem.dtype]:
            row.problem = _wrong("wrong", row.error)
            return _Ready(row)
        first = _Kept(call_of(problem, provider, inputs[0]))
        calls: list[timing.Call] = [first, *(call_of(problem, provider, each) for each in inputs[1:])]

        def again() -> float:
            if problem.restart is not None:
                problem.restart(name)
                first()
            return difference(problem, first.last, inputs[0], expected)

        return _Ready(row, calls, timing.warm_up(calls, device), again)
    except Unavailable as reason:
        row.problem = str(reason)
    # Whatever a compiler, a launch or a peer raises: one row must not end an hour's run.
    except Exception as failure:
        row.problem = _failed(failure, device)
    return _Ready(row)


def _check_again(item: _Ready, problem: Problem, device: torch.device) -> None:
    """Times of a provider that computes something else after, or because of, many calls count for nothing."""
    row = item.row
    try:
        row.error_after = item.again()
        if not row.error_after <= TOLERANCE[problem.dtype]:
            row.problem = _wrong("wrong after it was timed", row.error_after)
    except Exception as failure:
        row.problem = _failed(failure, device)
    if row.problem:
        row.rounds = []


def _wrong(what: str, relative_error: float) -> str:
    return f"{what}: relative error {relative_error:.1e} against the float64 reference"


def _failed(failure: Exception, device: torch.device) -> str:
    # After an illegal access nothing on the device works any more: this then raises, and ends the run.
    timing.synchronize(device)
    return f"failed: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"


def _input_sets(problem: Problem, device: torch.device) -> int:
    """Input sets to rotate through, so that no cache holds what a call reads.

    A CPU's caches are not flushed: its sets do it. A GPU's L2 is flushed before every sample, and a call
    still has other data at other addresses than the one before: two sets or twice what L2 holds, at most
    eight and a quarter of the free memory. With ``backward`` it is one, as every set keeps its forward pass.
    """
    if problem.bytes_moved <= 0:
        return 1
    if device.type != "cuda":
        return max(1, min(_MOST_INPUT_SETS, round(_CPU_CACHE_BYTES / problem.bytes_moved)))
    if problem.backward:
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = max(2, min(_MOST_INPUT_SETS_ON_A_GPU, math.ceil(2 * l2 / problem.bytes_moved)))
    room = torch.cuda.mem_get_info(device)[0] / 4
    return max(1, min(wanted, int(room / problem.bytes_moved)))
