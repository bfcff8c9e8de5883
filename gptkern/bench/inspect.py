"""The ahead-of-time report for people: what the compiler made of each kernel, and what it must move.

The machine code is read without a GPU (``gptkern.ops._aot``). Beside it stands a model of the work:
the fewest bytes and operations of a problem, and the time they take at an architecture's ceilings.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
import triton

from gptkern.bench import suites
from gptkern.bench.runs import Run, known_ops
from gptkern.bench.tables import seconds_text
from gptkern.durable import write_file
from gptkern.ops import _aot, _launch
from gptkern.ops._aot import Report

# Bytes a second and bf16 operations a second by datasheet: A100 80GB SXM, L40S, H100 SXM, B200.
DATASHEET = {80: (2.04e12, 312e12), 89: (0.864e12, 362e12), 90: (3.35e12, 989e12), 100: (8.0e12, 2250e12)}
NAMES = {80: "A100 80GB", 89: "L40S", 90: "H100 SXM", 100: "B200"}
_COMPARED = (
    "registers",
    "local_bytes",
    "shared_bytes",
    "blocks_per_sm",
    "matrix",
    "widest_load",
    "bulk",
    "code_bytes",
)

Key = tuple[str, str, str, str, int, int]


def index(reports: Iterable[Report]) -> dict[Key, Report]:
    """Reports by what identifies a kernel in another run: op, case, dtype, kernel, architecture.

    The last part counts variants of one kernel within one case, in their order.
    """
    found: dict[Key, Report] = {}
    for report in reports:
        name = (report.op, report.case, report.dtype, report.kernel, report.arch)
        variant = 0
        while (*name, variant) in found:
            variant += 1
        found[(*name, variant)] = report
    return found


def text(reports: Iterable[Report], runs: Iterable[Run] = ()) -> str:
    """A baseline as JSON, a line for each kernel, so that changes show in a line-by-line comparison."""
    rows = _lines(index(reports).values())
    counts = _lines(runs)
    more = f', "runs": [\n{counts}\n]' if counts else ""
    return f'{{"triton": "{triton.__version__}", "reports": [\n{rows}\n]{more}}}\n'


def _lines(items: Iterable[Report] | Iterable[Run]) -> str:
    return ",\n".join(json.dumps(dataclasses.asdict(item)) for item in items)


def save(reports: Iterable[Report], path: Path, runs: Iterable[Run] = ()) -> None:
    """Write a baseline."""
    write_file(path, text(reports, runs))


def load(path: Path) -> tuple[list[Report], str]:
    """(the reports of a baseline, the version of Triton that compiled them).

    Raises:
        ValueError: The file is no such baseline.
    """
    try:
        data = json.loads(path.read_text())
        reports = [Report(**{**row, "problems": tuple(row["problems"])}) for row in data["reports"]]
        return reports, data["triton"]
    except (OSError, KeyError, TypeError, ValueError) as failure:
        raise ValueError(f"{path}: not a report of gptkern inspect: {failure}") from failure


def load_runs(path: Path) -> list[Run]:
    """The counts of executed calls in a baseline; none where there are none.

    Raises:
        ValueError: The file is no such baseline.
    """
    try:
        return [Run(**row) for row in json.loads(path.read_text()).get("runs", [])]
    except (OSError, TypeError, ValueError) as failure:
        raise ValueError(f"{path}: not a report of gptkern inspect: {failure}") from failure


def merged_runs(old: Iterable[Run], new: Iterable[Run]) -> list[Run]:
    """``old`` with those of ``new`` in place of the same kernels' of the same calls, and the others."""
    runs = {run.key: run for run in old} | {run.key: run for run in new}
    return [runs[key] for key in sorted(runs)]


def merged(old: Iterable[Report], new: Iterable[Report]) -> list[Report]:
    """``old`` with the reports of ``new``'s operations and architectures replaced by ``new``'s."""
    found = list(new)
    covered = {(report.op, report.arch) for report in found}
    kept = [report for report in old if (report.op, report.arch) not in covered]
    return sorted(kept + found, key=lambda report: (report.op, report.arch))


def diff(old: Iterable[Report], new: Iterable[Report]) -> list[str]:
    """The changes in the generated code, a line for each kernel; empty where there are none.

    Kernels of operations and architectures that ``new`` does not cover are left out.
    """
    before, after = index(old), index(new)
    covered = {(name[0], name[4]) for name in after}
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if (name[0], name[4]) not in covered:
            continue
        title = f"{name[3]} sm_{name[4]} {name[2]} ({name[1]})"
        if name not in after:
            lines.append(f"- {title}")
        elif name not in before:
            lines.append(f"+ {title}")
        elif changes := _changes(before[name], after[name]):
            lines.append(f"~ {title}: {changes}")
    return lines


def _changes(old: Report, new: Report) -> str:
    pairs = ((field, getattr(old, field), getattr(new, field)) for field in _COMPARED)
    return ", ".join(f"{field} {before!r} -> {after!r}" for field, before, after in pairs if before != after)


def compiled(
    ops: Sequence[str],
    archs: tuple[int, ...],
    most: int | None = None,
    per: str = "binary",
    progress: Callable[[str], None] | None = None,
) -> list[Report]:
    """Compile these ops, or all, for these architectures; ``most`` kernels of each op.

    ``per`` says of what there is one report: ``binary``, ``row`` (of the launch table, by dtype), ``kernel``.
    ``progress`` is told each op before it is compiled.

    Raises:
        ValueError: There is no such op or architecture, or a case launches nothing.
    """
    known = known_ops(ops)
    for arch in archs:
        if arch not in _launch.ARCHS:
            raise ValueError(f"inspect: no launch table serves sm_{arch}; there are {_launch.ARCHS}")
    found: dict[str, list[Report]] = {}
    asked = list(ops or known)
    for number, op in enumerate(asked, 1):
        if progress is not None:
            progress(f"compiling {op} ({number} of {len(asked)})")
        found[op] = list(islice(_aot.reports(op, archs, per), most))
    for op in ops:
        if not found[op]:
            raise ValueError(f"inspect: {op} has no case for {', '.join(f'sm_{arch}' for arch in archs)}")
    return [report for reports in found.values() for report in reports]


def table(archs: tuple[int, ...], most: int | None = None) -> str:
    """A text table of all ops' reports, at most ``most`` kernels of each op."""
    return _aot.as_table(compiled([], archs, most))


def floors(ops: Sequence[str], arch: int) -> list[str]:
    """Bytes, operations and the least time on ``arch``, by datasheet, of the GPU problems of these ops.

    Raises:
        ValueError: One of them has no problems.
    """
    for op in ops:
        if op not in suites.OPS:
            raise ValueError(f"inspect: {op} has no problems in gptkern/bench/suites to tell least times of")
    copy, matmul = DATASHEET[arch]
    lines = []
    device = torch.device("cuda")
    for problem in (
        p for suite in ops or suites.OPS if suite in suites.OPS for p in suites.problems(suite, device)
    ):
        memory, compute = problem.bytes_moved / copy, problem.flops / matmul
        bound = "memory" if memory >= compute else "matrix units"
        lines.append(
            f"{problem.name}: {problem.bytes_moved / 1e6:.4g} MB, {problem.flops / 1e9:.4g} GFLOP, "
            f"at least {seconds_text(max(memory, compute))} ({bound})"
        )
    return lines
