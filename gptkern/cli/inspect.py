"""``gptkern inspect``: what the compiler made of the GPU kernels, without a GPU."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptkern.cli import terminal

if TYPE_CHECKING:
    from gptkern.bench.inspect import Report


class Per(Enum):
    """The unit that has one report: a binary, a launch row or a kernel."""

    BINARY = "binary"
    ROW = "row"
    KERNEL = "kernel"


def inspect(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Ops to compile; all of them if none is named.")
    ] = None,
    arch: Annotated[
        list[int] | None, typer.Option(help="Compute capability: 80, 89, 90 or 100; repeatable.")
    ] = None,
    per: Annotated[
        Per, typer.Option(help="Report every different binary, every launch row, or every kernel.")
    ] = Per.BINARY,
    diff: Annotated[Path | None, typer.Option(help="Print only the differences from this report.")] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the report as JSON. With ops named, a report that is there keeps its other ops."
        ),
    ] = None,
    floor: Annotated[
        bool, typer.Option("--floor", help="Print each problem's bytes, operations and least time, too.")
    ] = False,
    run: Annotated[
        bool,
        typer.Option(
            "--run",
            help="Execute small calls of the ops named, without a GPU, and count what their kernels do. "
            "For --arch 90 unless another is named; 80, 89 and 90 can be executed.",
        ),
    ] = False,
    calls: Annotated[
        int, typer.Option(min=1, help="With --run: small calls of each op to execute, the first ones.")
    ] = 3,
    json_: Annotated[
        bool, typer.Option("--json", help="Print what --save writes, or with --diff a list of differences.")
    ] = False,
) -> int:
    """Compile the kernels for a GPU and read the machine code: no GPU is needed.

    For each kernel and launch configuration: registers, local memory (spills), shared memory, blocks a
    multiprocessor holds, the matrix instruction, the widest load, the code's size. Exits with 1 where a
    kernel spills, does not fit, or misses its matrix instruction, and where --diff finds a difference. An op
    that launches no kernel is an error.

    With --run the code is not reported but executed, on small inputs, and counted as a profiler would:
    instructions that warps execute, products of the matrix units, barriers and waits; the sectors of 32 bytes
    that requests touch in global memory, over the fewest that would hold what they ask for (above 1: accesses
    are scattered); the turns that shared memory takes, over the fewest (above 1: bank conflicts). Beside them
    stands the floor: each byte once, and the time for that. A read past a tensor's end, before a wait or
    without a barrier is an error that names the instruction.

    Examples:

    - `gptkern inspect flash_attention --arch 90`

    - `gptkern inspect layer_norm --run --calls 1`

    - `gptkern inspect --save before.json`, change a kernel, `gptkern inspect --diff before.json`

    - `gptkern inspect linear --per row --arch 80 --arch 90 --arch 100 --save benchmarks/machine_code.json`
      replaces linear's rows of the baseline, and no others

    - `gptkern inspect --per row --arch 80 --arch 90 --arch 100 --diff benchmarks/machine_code.json`
      compares a checkout with the baseline that it carries
    """
    import triton

    from gptkern.bench import inspect as report
    from gptkern.bench import runs as counts
    from gptkern.ops import _aot, _launch

    archs = tuple(arch or ((90,) if run else _launch.ARCHS))
    before = None if diff is None else report.load(diff)
    before_runs = [] if diff is None else report.load_runs(diff)
    kept = _saved_reports(save, triton.__version__) if ops and save is not None else []
    kept_runs = report.load_runs(save) if ops and save is not None and save.exists() else []
    floors = {each: report.floors(ops or [], each) for each in archs} if floor else {}
    runs = counts.executed_runs(ops or [], archs, calls, _tell) if run else []
    found = [] if run else report.compiled(ops or [], archs, per=per.value, progress=_tell)
    lines: list[str] = []
    if before is not None:
        lines = report.diff(before[0], found) + counts.diff(before_runs, runs)
    if json_:
        print(report.text(found, runs) if before is None else json.dumps(lines))
    elif before is not None:
        terminal.write("\n".join(lines) or f"the {'counts are' if run else 'machine code is'} the same")
        if lines and before[1] != triton.__version__:
            terminal.write(f"{diff} was compiled by triton {before[1]}, this is {triton.__version__}")
    else:
        print(counts.table(runs, report.DATASHEET) if run else _aot.as_table(found))
    for each, times in {} if json_ else floors.items():
        print(f"\nleast times on sm_{each} ({report.NAMES[each]}, by datasheet)")
        print("\n".join(times))
    if save is not None:
        report.save(report.merged(kept, found), save, report.merged_runs(kept_runs, runs))
    return int(bool(lines) or any(item.problems for item in found))


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _saved_reports(path: Path, version: str) -> list[Report]:
    """The reports that are in ``path`` already, none where there is no such file.

    Raises:
        ValueError: The file is no report, or another version of Triton compiled it.
    """
    from gptkern.bench import inspect as report

    if not path.exists():
        return []
    reports, compiled_by = report.load(path)
    if compiled_by != version:
        raise ValueError(
            f"inspect: {path} was compiled by triton {compiled_by}, this is {version}: one report holds one "
            "version's code. Name no op, to write it anew, or another file"
        )
    return reports
