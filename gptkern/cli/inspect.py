"""``gptkern inspect``: what the compiler made of the GPU kernels, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Ops to compile; all of them if none is named.")
    ] = None,
    arch: Annotated[
        list[int] | None, typer.Option(help="Compute capability: 80, 89, 90 or 100; repeatable.")
    ] = None,
    diff: Annotated[Path | None, typer.Option(help="Only what differs from this report.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    floor: Annotated[
        bool, typer.Option("--floor", help="Also bytes, operations and least time a problem.")
    ] = False,
) -> int:
    """Compile the kernels for a GPU and read the machine code: no GPU is needed.

    For each kernel and launch configuration: registers, local memory (spills), shared memory, blocks a
    multiprocessor holds, the matrix instruction, the widest load, the code's size. Exits with 1 where a
    kernel spills, does not fit, or misses its matrix instruction.

    Examples:

    - `gptkern inspect flash_attention --arch 90`

    - `gptkern inspect --save before.json`, change a kernel, `gptkern inspect --diff before.json`
    """
    from gptkern.bench import inspect as report
    from gptkern.ops import _aot, _launch

    archs = tuple(arch or _launch.ARCHS)
    found = report.compiled(ops or [], archs)
    if diff is not None:
        lines = report.diff(report.load(diff), found)
        print("\n".join(lines) or "the machine code is the same")
    else:
        print(_aot.as_table(found))
    if floor:
        for each in archs:
            print(f"\nleast times on sm_{each} ({report.NAMES[each]}, by datasheet)")
            print("\n".join(report.floors(ops or [], each)))
    if save is not None:
        report.save(found, save)
    return int(any(item.problems for item in found))
