"""The machine code of the kernels, without a GPU: registers, spills, shared memory, instructions.

Every op's ``CASES`` (see ``_cases``) are called on meta tensors while launches are recorded
(``_launch.record``); each recorded launch is compiled by Triton's own just-in-time path, which
sees a GPU of the chosen architecture, so that argument types, divisibility by 16 and values
equal to 1 are specialised as in a real launch. The machine code is then read.

    python -m gptkern.ops._aot                     # all ops, all architectures, as a table
    python -m gptkern.ops._aot --op layer_norm --arch 90 --json report.json

Must run without TRITON_INTERPRET: under it kernels are Python functions and nothing is compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from gptkern.durable import write_file
from gptkern.ops import _cases, _launch
from gptkern.ops._dispatch import INTERPRETED

_REGISTERS_PER_SM = 65536
_REGISTER_ALLOCATION_UNIT = 256
_SHARED_RESERVED_PER_BLOCK = 1024


class _Limits(NamedTuple):
    """The limits of one multiprocessor (CUDA programming guide, compute capabilities)."""

    shared: int
    threads: int
    blocks: int

    @property
    def shared_per_block(self) -> int:
        return self.shared - _SHARED_RESERVED_PER_BLOCK


_LIMITS = {
    80: _Limits(164 * 1024, 2048, 32),
    86: _Limits(100 * 1024, 1536, 16),
    87: _Limits(164 * 1024, 1536, 16),
    89: _Limits(100 * 1024, 1536, 24),
    90: _Limits(228 * 1024, 2048, 32),
    100: _Limits(228 * 1024, 2048, 32),
    103: _Limits(228 * 1024, 2048, 32),
    120: _Limits(100 * 1024, 1536, 24),
}

# The last instruction that occurs classifies the kernel: a wgmma kernel may hold a small mma.sync beside it.
_MATRIX_INSTRUCTIONS = {"mma.sync": "mma.sync.", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
_GLOBAL_LOAD = re.compile(r"\bld(?:\.\w+)*?\.global(?:[.:]\w+)*?(?:\.v(\d))?\.[bsuf](\d+)\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)")
_BULK_COPY = "cp.async.bulk.tensor"
_SUM_OR_MOVE = re.compile(r"^\s*(?:@\S+\s+)?(shfl|mov|mul|add|sub|fma)(\.[\w.]+)\s+([^;]*);", re.MULTILINE)


@dataclass(frozen=True)
class Report:
    """The resources and instructions of one compiled kernel.

    ``local_bytes`` is the stack frame of a thread, where values spill that do not fit in registers.
    ``matrix`` is the matrix instruction, or "" if there is none. ``widest_load`` is the number of bytes of
    the widest load from global memory by one thread; ``bulk`` is True for copies by the copy engine.
    ``serialised`` is True if ptxas makes each wgmma end before the next one starts.
    """

    op: str
    case: str
    dtype: str
    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    local_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    matrix: str
    serialised: bool
    widest_load: int
    bulk: bool
    code_bytes: int
    problems: tuple[str, ...]


class _Target:
    """The few methods of a Triton driver that the compiler calls."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # keeps the architectures' compiled kernels apart

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling_for(arch: int) -> Iterator[None]:
    if INTERPRETED or triton.knobs.runtime.interpret:
        raise RuntimeError("ahead-of-time compilation needs a process without TRITON_INTERPRET")
    config = triton.runtime.driver
    previous = config._active
    config.set_active(_Target(arch))
    try:
        yield
    finally:
        config._active = previous


def compile_launch(launch: _launch.Launch, arch: int) -> Any:
    """Triton's compiled kernel for ``launch`` on ``arch``."""
    with _compiling_for(arch):
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.kwargs)


@functools.cache
def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def _code_bytes(cubin: bytes) -> int:
    """Size of the machine code: the ``.text`` sections of a 64-bit little-endian ELF file."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)

    def section(index: int) -> tuple[int, int, int]:
        name, _, _, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, headers + index * size)
        return name, offset, length

    _, names, _ = section(names_index)
    return sum(
        length for name, _, length in map(section, range(count)) if cubin.startswith(b".text", names + name)
    )


def blocks_per_sm(arch: int, threads: int, registers: int, shared_bytes: int) -> int:
    """The number of blocks that one multiprocessor of ``arch`` holds at once; 0 if a block does not fit."""
    warps = -(-threads // 32)
    units = -(-registers * 32 // _REGISTER_ALLOCATION_UNIT)
    limits = _LIMITS[arch]
    if shared_bytes > limits.shared_per_block:
        return 0
    return min(
        limits.blocks,
        limits.threads // threads,
        _REGISTERS_PER_SM // (units * _REGISTER_ALLOCATION_UNIT * warps),
        limits.shared // (shared_bytes + _SHARED_RESERVED_PER_BLOCK),
    )


def _serialised(ptx: str) -> bool:
    """True if ptxas warns (C7510, C7515) that it serialises wgmma; machine code hardly shows it."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [get_ptxas(90).path, "-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a"]
        process = subprocess.run(
            [*command, source.name, "-o", os.devnull], capture_output=True, text=True, check=True
        )
    return "wgmma.mma_async instructions are serialized" in process.stderr


def _widest_load(ptx: str) -> int:
    loads = [int(lanes or 1) * int(bits) // 8 for lanes, bits in _GLOBAL_LOAD.findall(ptx)]
    copies = [int(size, 0) for size in _ASYNC_COPY.findall(ptx)]
    return max(loads + copies, default=0)


def joined_products(ptx: str) -> list[str]:
    """The sums of a product and of what another lane sent that round once, in PTX or in the assembler.

    Two lanes that exchange their products then hold different sums (see ``_device.rounded_product``).
    """
    sent, products, found = set[str](), set[str](), list[str]()
    for match in _SUM_OR_MOVE.finditer(ptx):
        name, form, operands = match.groups()
        target, *sources = re.findall(r"%\w+", operands) or [""]
        if name == "shfl" or (name == "mov" and sent.intersection(sources)):
            sent.add(target)
        elif name == "mul" and ".f32" in form and ".rn" not in form:
            products.add(target)
        elif ".f32" in form and name in ("fma", "add", "sub"):
            joined = sources[-1:] if name == "fma" else sources if products.intersection(sources) else []
            if sent.intersection(joined):
                found.append(match.group(0).strip())
    return found


def _threads(ptx: str, num_warps: int) -> int:
    required = re.search(r"\.reqntid (\d+)", ptx)  # warp specialisation adds warps to num_warps
    return int(required.group(1)) if required else 32 * num_warps


def _problems(case: _cases.Case, report: Report) -> Iterator[str]:
    if report.local_bytes > case.spills.get(report.arch, 0):
        yield f"spills {report.local_bytes} bytes a thread to local memory"
    room = _LIMITS[report.arch].shared_per_block
    if report.shared_bytes > room:
        yield f"needs {report.shared_bytes} bytes of shared memory; sm_{report.arch} has {room} a block"
    half = report.dtype in ("float16", "bfloat16")
    if report.arch == 90 and half and report.matrix == "mma.sync" and report.kernel not in case.mma_sync:
        yield "multiplies with mma.sync, not wgmma"
    if report.serialised and report.kernel not in case.serialised:
        yield "ptxas serialises its wgmma instructions"


def inspect(op: str, case: _cases.Case, dtype: torch.dtype, launch: _launch.Launch, arch: int) -> Report:
    """Compile one recorded launch and read its machine code."""
    compiled = compile_launch(launch, arch)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, local_bytes = _resources(cubin)
    metadata = compiled.metadata
    matrix = ""
    for name, mnemonic in _MATRIX_INSTRUCTIONS.items():
        if mnemonic in ptx:
            matrix = name
    report = Report(
        op=op,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        kernel=launch.name,
        arch=arch,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=registers,
        local_bytes=local_bytes,
        shared_bytes=metadata.shared,
        blocks_per_sm=blocks_per_sm(arch, _threads(ptx, metadata.num_warps), registers, metadata.shared),
        matrix=matrix,
        serialised=matrix == "wgmma" and _serialised(ptx),
        widest_load=_widest_load(ptx),
        bulk=_BULK_COPY in ptx,
        code_bytes=_code_bytes(cubin),
        problems=(),
    )
    joined = [f"adds a product to another lane's value at once: {line}" for line in joined_products(ptx)]
    return dataclasses.replace(report, problems=(*_problems(case, report), *joined[:1]))


def _kind(launch: _launch.Launch, dtype: torch.dtype, arch: int, per: str) -> tuple[Any, ...]:
    """A key: one launch for each different key is enough."""
    if per == "kernel":
        return (launch.name,)
    row_keys = {key for rows in _launch.table(arch).values() for row in rows for key in row}
    return (launch.name, dtype, *sorted(item for item in launch.kwargs.items() if item[0] in row_keys))


def _cases_for(op: str, arch: int) -> list[_cases.Case]:
    return [case for case in _cases.cases(op) if case.archs is None or arch in case.archs]


def reports(op: str, archs: tuple[int, ...] = _launch.ARCHS, per: str = "binary") -> Iterator[Report]:
    """Reports on the kernels that the cases of ``op`` launch.

    ``per`` selects one report for every different "binary", for every launch "row" and dtype, or for every
    "kernel".
    """
    for arch in archs:
        seen = set()
        for case in _cases_for(op, arch):
            for dtype in case.dtypes:
                for launch in _cases.record_case(case, dtype, arch):
                    if per == "binary":
                        kind = (compile_launch(launch, arch).hash,)
                    else:
                        kind = _kind(launch, dtype, arch, per)
                    if kind not in seen:
                        seen.add(kind)
                        yield inspect(op, case, dtype, launch, arch)


def rows_without_case(arch: int) -> list[str]:
    """Rows of the launch table of ``arch`` that no op's cases use, so that nothing compiles them."""
    for op in _cases.ops():
        for case in _cases_for(op, arch):
            for dtype in case.dtypes:
                _cases.record_case(case, dtype, arch)
    return [
        f"sm_{arch}: {kernel}, row {index + 1}"
        for kernel, rows in _launch.table(arch).items()
        for index in range(len(rows))
        if (arch, kernel, index) not in _launch.row_lookups
    ]


_COLUMNS = (
    "kernel",
    "arch",
    "dtype",
    "num_warps",
    "num_stages",
    "registers",
    "local_bytes",
    "shared_bytes",
    "blocks_per_sm",
    "matrix",
    "serialised",
    "widest_load",
    "bulk",
    "code_bytes",
    "case",
)


def as_table(rows: list[Report]) -> str:
    """The reports as aligned text, one line a kernel, problems beneath their kernel."""
    cells = [_COLUMNS] + [tuple(str(getattr(report, name)) for name in _COLUMNS) for report in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    for position in range(len(rows), 0, -1):
        lines[position + 1 : position + 1] = [f"    {problem}" for problem in rows[position - 1].problems]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if a kernel has a problem or a launch row has no case."""
    parser = argparse.ArgumentParser(prog="python -m gptkern.ops._aot", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", help="only this op (repeatable)")
    parser.add_argument(
        "--arch",
        action="append",
        type=int,
        choices=tuple(_LIMITS),
        help="only this one (repeatable)",
    )
    parser.add_argument(
        "--per",
        choices=("binary", "row", "kernel"),
        default="binary",
        help="one report of every different binary (default), launch row or kernel",
    )
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--rows", action="store_true", help="only list launch rows without a case")
    options = parser.parse_args(arguments)
    archs = tuple(options.arch or _launch.ARCHS)
    if options.rows:
        missing = [row for arch in archs for row in rows_without_case(arch)]
        print("\n".join(missing))
        return int(bool(missing))
    results = [report for op in options.op or _cases.ops() for report in reports(op, archs, options.per)]
    print(as_table(results))
    if options.json:
        write_file(options.json, json.dumps([dataclasses.asdict(report) for report in results], indent=1))
    return int(any(report.problems for report in results))


if __name__ == "__main__":
    sys.exit(main())
