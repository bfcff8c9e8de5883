"""Tuning the launch table: for each row, the neighbouring configurations that the cases run faster with.

A row is timed by the launches that it decides: those of the op's cases that ask for it. A candidate
must give the same results within the dtype's rounding, and machine code without a problem (``_aot``).
The search climbs: it takes the first neighbour that is faster by more than the noise, and goes on
from there until none is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from gptkern.bench import environment, launch_file, timing
from gptkern.bench.problem import TOLERANCE
from gptkern.ops import _aot, _cases, _launch

# What a candidate must gain to be taken: less is noise.
LEAST_GAIN = 0.02
_TIMINGS = 20
_MOST = {"num_warps": 16, "num_stages": 6}

Row = dict[str, Any]
Measure = Callable[[Row], float]


@dataclass(frozen=True)
class TypedCase:
    """One case, in one dtype."""

    op: str
    case: _cases.Case
    dtype: torch.dtype


@dataclass(frozen=True)
class Place:
    """One row of the launch table of an architecture, and what is run with it."""

    arch: int
    kernel: str
    index: int
    cases: tuple[TypedCase, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kernel}, row {self.index + 1}"

    @property
    def row(self) -> Row:
        """The row as the table has it."""
        return _launch.table(self.arch)[self.kernel][self.index]


def places(ops: Iterable[str], arch: int) -> list[Place]:
    """The rows that the cases of these ops ask for, in the table's order."""
    found: dict[tuple[str, int], list[TypedCase]] = {}
    for op in ops:
        for case in _cases.cases(op):
            for dtype in case.dtypes if case.archs is None or arch in case.archs else ():
                _launch.forget()
                _cases.record_case(case, dtype, arch)
                for _, kernel, index in sorted(_launch.row_lookups):
                    found.setdefault((kernel, index), []).append(TypedCase(op, case, dtype))
    order = list(_launch.table(arch))
    keys = sorted(found, key=lambda key: (order.index(key[0]), key[1]))
    return [Place(arch, *key, tuple(found[key])) for key in keys]


def neighbours(row: Row) -> Iterator[Row]:
    """Every configuration that differs in one thing: half or twice a size, one stage more or less."""
    for name, value in row.items():
        # Conditions stay, and so do switches: whether TMA may be used, say, is no matter of time alone.
        if name.startswith("max") or isinstance(value, (str, bool)):
            continue
        others = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for other in others:
            if 1 <= other <= _MOST.get(name, math.inf):
                yield {**row, name: other}


def climb(row: Row, measure: Measure, sound: Callable[[Row], bool]) -> tuple[Row, float]:
    """(the best configuration found from ``row``, its time over the row's).

    Args:
        measure: A configuration's time, in any unit; inf where it does not run or is wrong.
        sound: Whether a faster one may be taken.
    """
    best, first = row, measure(row)
    least = first
    tried = [row]
    climbing = True
    while climbing:
        climbing = False
        for candidate in neighbours(best):
            if candidate in tried:
                continue
            tried.append(candidate)
            found = measure(candidate)
            if found < least * (1 - LEAST_GAIN) and sound(candidate):
                best, least, climbing = candidate, found, True
                break
    return best, least / first


def tuned(
    place: Place, device: torch.device, timer: Callable[[timing.Call], float] | None = None
) -> tuple[Row, float]:
    """(the best row found for a place, its time over the present one's), measured on ``device``.

    Args:
        timer: Seconds of a call; CUDA events around it, the cache flushed before, when None.
    """
    bench = _Bench(place, device, timer or _seconds(device))
    return climb(place.row, bench.measure, bench.sound)


def _seconds(device: torch.device) -> Callable[[timing.Call], float]:
    def seconds(call: timing.Call) -> float:
        estimate = timing.warm_up([call], device, 0.01)
        return median(timing.sample([call], device, _TIMINGS, estimate))

    return seconds


class _Bench:
    """Runs one place's cases with candidates in the place of its row."""

    def __init__(self, place: Place, device: torch.device, timer: Callable[[timing.Call], float]) -> None:
        self._place, self._device, self._timer = place, device, timer
        self._expected: list[list[torch.Tensor]] = []

    def measure(self, row: Row) -> float:
        """The geometric mean of the cases' seconds; inf where one fails or comes out differently."""
        times = []
        for number, case in enumerate(self._place.cases):
            try:
                times.append(self._one(number, case, row))
            # What does not fit, does not compile or is refused by an op: whatever it is, it is no candidate.
            except Exception:
                return math.inf
        return geometric_mean(times) if all(map(math.isfinite, times)) else math.inf

    def sound(self, row: Row) -> bool:
        """True if the machine code of every case is without a problem."""
        arch = self._place.arch
        return not any(
            _aot.inspect(case.op, case.case, case.dtype, launches[i], arch).problems
            for case in self._place.cases
            for launches in [self._recorded(case, row)]
            for i in self._decided(case, row)
        )

    def _one(self, number: int, case: TypedCase, row: Row) -> float:
        place = self._place
        decided = self._decided(case, row)
        with _launch.replaced_row(place.arch, place.kernel, place.index, row):
            launches, results = _run(case, self._device)
        if number == len(self._expected):
            self._expected.append(results)
        if not all(_near(a, b, case.dtype) for a, b in zip(results, self._expected[number], strict=True)):
            return math.inf
        chosen = [launches[i] for i in decided]

        def again() -> None:
            for launch in chosen:
                launch.kernel[launch.grid](*launch.args, **launch.kwargs)

        with _launch.on_device(self._expected[number][0]):
            return self._timer(again)

    def _decided(self, case: TypedCase, row: Row) -> list[int]:
        """Indices of the case's launches that the row decides: those that another number of warps changes."""
        warps = row["num_warps"]
        probe = {**row, "num_warps": warps // 2 if warps > 1 else 2}
        as_is, probed = (self._recorded(case, each) for each in (row, probe))
        return [
            i
            for i, (a, b) in enumerate(zip(as_is, probed, strict=True))
            if a.kwargs["num_warps"] != b.kwargs["num_warps"]
        ]

    def _recorded(self, case: TypedCase, row: Row) -> list[_launch.Launch]:
        with _launch.replaced_row(self._place.arch, self._place.kernel, self._place.index, row):
            return _cases.record_case(case.case, case.dtype, self._place.arch)


def _run(case: TypedCase, device: torch.device) -> tuple[list[_launch.Launch], list[torch.Tensor]]:
    """The launches of a case, made for real in ``record_case``'s order, and its results and gradients."""
    launches: list[_launch.Launch] = []

    def keep(item: _launch.Launch) -> bool:
        launches.append(item)
        return True

    torch.manual_seed(0)
    with _launch.observe(keep):
        call = case.case.make(device, case.dtype)
        with torch.no_grad():
            results = _cases.tensors(case.case.op(*call.args, **call.kwargs))
        torch.manual_seed(0)
        call = case.case.make(device, case.dtype)
        inputs = [t for t in _cases.tensors((call.args, call.kwargs)) if t.requires_grad]
        if inputs:
            outputs = [t for t in _cases.tensors(case.case.op(*call.args, **call.kwargs)) if t.requires_grad]
            seeds = [torch.randn_like(t) for t in outputs]
            results += [
                t for t in torch.autograd.grad(outputs, inputs, seeds, allow_unused=True) if t is not None
            ]
    return launches, results


def _near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    if not got.is_floating_point():
        return torch.equal(got, expected)
    difference = (got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
    return bool(difference <= TOLERANCE[dtype])


def note(device: torch.device) -> str:
    """A comment for a tuned row: the machine that it was measured on."""
    where = environment.describe(device)
    versions = where["versions"]
    return f"{where['device']}, triton {versions['triton']}, {where['time'][:10]}, commit {where['commit']}"


def tune(
    places: Sequence[Place],
    path: Path,
    device: torch.device,
    timer: Callable[[timing.Call], float] | None = None,
) -> Iterator[tuple[Place, Row, float]]:
    """Tune rows one by one; each is written into the table at ``path`` as soon as it is found.

    Yields:
        The place, its row now, and the row's time over that of the one before.
    """
    table, header = launch_file.read(path)
    for place in places:
        row, ratio = tuned(place, device, timer)
        row = {**row, "measured": note(device)}
        table[place.kernel][place.index] = row
        launch_file.write(table, header, path)
        yield place, row, ratio


def pending(places: Sequence[Place], path: Path, device: torch.device, again: bool) -> list[Place]:
    """The places whose rows at ``path`` were not measured on such a device yet; with ``again`` all of them.

    Raises:
        ValueError: The table at ``path`` has other rows than the package's.
    """
    table, _ = launch_file.read(path)
    for place in places:
        if len(table.get(place.kernel, ())) != len(_launch.table(place.arch)[place.kernel]):
            raise ValueError(
                f"{path}: its rows of {place.kernel} are not those of the package: begin a new file"
            )
    name = environment.device_name(device)
    measured = (table[place.kernel][place.index].get("measured", "") for place in places)
    return [place for place, text in zip(places, measured, strict=True) if again or not text.startswith(name)]
