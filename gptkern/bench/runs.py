"""Small calls of the ops, executed without a GPU: what their kernels really do, beside what they must.

The compiler's text is executed (``gptkern.testing.ptx``) and counted. Beside the counts stands the floor: the
bytes of global memory that a call uses, each read or written once, and the time that these and its matrix
products take at an architecture's ceilings.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from gptkern import testing
from gptkern.bench.tables import seconds_text
from gptkern.ops import _cases
from gptkern.testing.ptx.counters import Counters
from gptkern.testing.ptx.kernels import executed

# The architectures whose instructions the executor has.
ARCHS = (80, 89, 90)
_LEGEND = """\
floor: distinct bytes of global memory that are read and written, and the least time for them and the products
requested: bytes of global memory that lanes ask for; what other lanes asked for already is often in a cache
sectors: pieces of 32 bytes that the warps' requests touch, over the fewest that would hold what they ask for
wavefronts: turns that shared memory takes, over the fewest; more than 1.00 are bank conflicts"""


@dataclass(frozen=True)
class Run:
    """The counts of one kernel within one call, over all its launches.

    Attributes:
        instructions: By class, one for each warp that executes it; of the text that ptxas is given.
        operations: Of matrix products, two for each multiply and add.
        read, written: Distinct bytes of global memory, each once a launch.
        requested: Bytes of global memory that lanes asked for.
        sectors, fewest_sectors: Pieces of 32 bytes that requests touch, and that would hold all of it.
        wavefronts, fewest_wavefronts: Turns of shared memory, and without bank conflicts.
    """

    op: str
    case: str
    dtype: str
    kernel: str
    arch: int
    launches: int
    instructions: dict[str, int]
    operations: int
    read: int
    written: int
    requested: int
    sectors: int
    fewest_sectors: int
    wavefronts: int
    fewest_wavefronts: int

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """The names by which another run's kernel is the same one."""
        return self.op, self.case, self.dtype, self.kernel, self.arch


def known_ops(ops: Sequence[str]) -> list[str]:
    """All ops that have cases.

    Raises:
        ValueError: One of ``ops`` is not among them.
    """
    known = _cases.ops()
    for op in ops:
        if op not in known:
            raise ValueError(f"inspect: there is no op {op!r}; there are {', '.join(known)}")
    return known


def executed_runs(
    ops: Sequence[str],
    archs: Sequence[int],
    calls: int,
    progress: Callable[[str], None] | None = None,
) -> list[Run]:
    """Execute the first small calls of these ops in bf16, forward and backward.

    Raises:
        ValueError: No op is named, there is no such op or it has no small calls, or an architecture is not
            served.
        Fault: A kernel does what no GPU would forgive.
    """
    if not ops:
        raise ValueError("inspect: --run executes the ops that are named; name at least one")
    for arch in archs:
        if arch not in ARCHS:
            raise ValueError(f"inspect: --run executes sm_80, sm_89 and sm_90; got --arch {arch}")
    known_ops(ops)
    found: list[Run] = []
    for op in ops:
        cases = list(islice(_cases.checks(op), calls))
        if not cases:
            raise ValueError(f"inspect: {op} has no small calls in its cases.py to execute")
        for arch in archs:
            for case in cases:
                if progress is not None:
                    progress(f"executing {op}, {case.name}, for sm_{arch}")
                found += _runs(op, case, arch)
    return found


def _runs(op: str, case: _cases.Case, arch: int) -> list[Run]:
    torch.manual_seed(0)
    call = case.make(torch.device("cpu"), torch.bfloat16)
    counters: dict[str, Counters] = defaultdict(Counters)
    with executed(arch, counters=counters):
        testing._run(case.op, call)
    return [_run(op, case.name, kernel, arch, counts) for kernel, counts in counters.items()]


def _run(op: str, case: str, kernel: str, arch: int, counts: Counters) -> Run:
    requested, sectors, fewest_sectors = counts.total("global")
    _, wavefronts, fewest_wavefronts = counts.total("shared")
    return Run(
        op, case, "bfloat16", kernel, arch, counts.launches, dict(sorted(counts.instructions.items())),
        counts.operations, counts.read, counts.written, requested, sectors, fewest_sectors, wavefronts,
        fewest_wavefronts,
    )  # fmt: skip


_COLUMNS = (
    "kernel", "launches", "instructions", "products", "barriers", "waits", "floor", "least time", "requested",
    "sectors", "wavefronts",
)  # fmt: skip


def table(runs: Iterable[Run], ceilings: Mapping[int, tuple[float, float]]) -> str:
    """The runs as aligned text, a block a call; ``ceilings``: bytes and operations a second, by ``arch``."""
    blocks = []
    calls: dict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for run in runs:
        calls[run.op, run.case, run.arch].append(run)
    for (op, case, arch), those in calls.items():
        rows = [_COLUMNS, *(_cells(run, ceilings[arch]) for run in those)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        blocks.append("\n".join([f"{op}, {case}, bfloat16, sm_{arch}", *lines]))
    return "\n\n".join([*blocks, _LEGEND])


def _cells(run: Run, ceilings: tuple[float, float]) -> tuple[str, ...]:
    moved = run.read + run.written
    least = max(moved / ceilings[0], run.operations / ceilings[1])
    count = run.instructions
    return (
        run.kernel, str(run.launches), str(sum(count.values())), f"{run.operations / 1e6:.3g} MFLOP",
        str(count.get("barrier", 0)), str(count.get("wait", 0)), f"{moved} B", seconds_text(least),
        f"{run.requested} B", _over(run.sectors, run.fewest_sectors),
        _over(run.wavefronts, run.fewest_wavefronts),
    )  # fmt: skip


def _over(count: int, fewest: int) -> str:
    return f"{count} ({count / fewest:.2f})" if fewest else "none"


def diff(old: Iterable[Run], new: Iterable[Run]) -> list[str]:
    """The changes in the counts, a line a kernel; calls that ``new`` does not have are left out."""
    before = {run.key: run for run in old}
    lines = []
    for run in new:
        title = f"{run.kernel} sm_{run.arch} {run.dtype} ({run.case}) executed"
        if run.key not in before:
            lines.append(f"+ {title}")
        elif changes := _changes(before[run.key], run):
            lines.append(f"~ {title}: {', '.join(changes)}")
    return lines


def _changes(old: Run, new: Run) -> list[str]:
    pairs: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(Run):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if field.name == "instructions":
            pairs += [
                (f"{label} instructions", a.get(label, 0), b.get(label, 0)) for label in sorted({*a, *b})
            ]
        else:
            pairs.append((field.name, a, b))
    return [f"{name} {a!r} -> {b!r}" for name, a, b in pairs if a != b]
