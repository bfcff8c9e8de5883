"""Every kernel in every launch configuration compiles to sound machine code, with no GPU at hand.

Compiling needs a process without TRITON_INTERPRET, so ops are built in others; few, as each imports torch.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton

from gptkern.bench import inspect as baseline
from gptkern.ops import _aot, _cases, _launch

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "benchmarks" / "machine_code.json"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptkern.ops._aot", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)


def _compile(ops: Iterable[str], archs: Iterable[int], per: str) -> None:
    words = [word for op in ops for word in ("--op", op)]
    words += [word for arch in archs for word in ("--arch", str(arch))]
    done = _run("--per", per, *words)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("part", "second"), [(0, 80), (1, 100), (2, 80), (3, 100)])
def test_kernels_compile(part: int, second: int) -> None:
    """Every kernel of every fourth op once for sm_90, and once for one of the others."""
    _compile(list(_cases.ops())[part::4], (90, second), "kernel")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op", _cases.ops())
def test_launch_rows_compile(op: str) -> None:
    """Every launch row once, to the machine code that the committed baseline describes."""
    inspect = "from gptkern.cli import main; main()"
    archs = [word for arch in (80, 90, 100) for word in ("--arch", str(arch))]
    _, version = baseline.load(BASELINE)
    compared = ["--diff", str(BASELINE)] if version == triton.__version__ else []
    command = [sys.executable, "-c", inspect, "inspect", op, "--per", "row", *archs, *compared]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"{done.stdout}\n{done.stderr[-4000:]}\n"
        f"Where the change is meant: gptkern inspect {op} --per row {' '.join(archs)} "
        f"--save {BASELINE.relative_to(ROOT)}"
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", _cases.ops())
def test_cases_compile(op: str) -> None:
    _compile([op], _launch.ARCHS, "binary")


def test_every_launch_row_is_compiled_by_a_case() -> None:
    done = _run("--rows", "--arch", "80", "--arch", "90", "--arch", "100")
    assert done.returncode == 0, f"rows without a case:\n{done.stdout}\n{done.stderr[-4000:]}"


# What the occupancy calculator of CUDA's toolkit gives.
@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        (90, 128, 32, 0, 16),
        (90, 128, 255, 0, 2),
        (90, 256, 64, 0, 4),
        (90, 128, 32, 227 * 1024, 1),
        (90, 128, 32, 113 * 1024, 2),
        (80, 128, 32, 163 * 1024, 1),
        (80, 128, 32, 164 * 1024, 0),
        (90, 32, 16, 0, 32),
        (86, 32, 16, 0, 16),
        (89, 32, 16, 0, 24),
        (89, 256, 32, 0, 6),
        (89, 128, 32, 99 * 1024, 1),
        (120, 128, 32, 100 * 1024, 0),
    ],
)
def test_blocks_per_sm(arch: int, threads: int, registers: int, shared: int, expected: int) -> None:
    assert _aot.blocks_per_sm(arch, threads, registers, shared) == expected


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("fma.rn.f32 %r4, %r1, %r2, %r7;", 1),  # a product and an exchange
        ("add.f32 %r4, %r5, %r7;", 1),  # the assembler may join them
        ("fma.rn.f32 %r8, %r1, %r2, 0f00000000; add.f32 %r4, %r8, %r7;", 0),
        ("fma.rn.f32 %r4, %r7, %r2, %r1;", 0),
        ("add.f32 %r4, %r3, %r7;", 0),
    ],
)
def test_products_that_are_joined_with_an_exchange_are_found(line: str, count: int) -> None:
    exchange = "mul.f32 %r5, %r1, %r2; shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1; mov.b32 %r7, %r6;"
    assert len(_aot.joined_products(f"{exchange} {line}".replace(";", ";\n"))) == count


_SOUND = _aot.Report(
    op="linear",
    case="a call",
    dtype="bfloat16",
    kernel="linear",
    arch=90,
    num_warps=8,
    num_stages=3,
    registers=128,
    local_bytes=0,
    shared_bytes=96 * 1024,
    blocks_per_sm=2,
    matrix="wgmma",
    serialised=False,
    widest_load=16,
    bulk=False,
    code_bytes=4096,
    problems=(),
)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"local_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 228 * 1024}, "needs 233472 bytes of shared memory; sm_90 has 232448"),
        ({"shared_bytes": 100 * 1024, "arch": 89}, "sm_89 has 101376"),
        ({"matrix": "mma.sync"}, "mma.sync, not wgmma"),
        ({"matrix": "mma.sync", "arch": 80}, None),
        ({"matrix": "mma.sync", "kernel": "declared"}, None),
        ({"serialised": True}, "serialises"),
        ({"serialised": True, "kernel": "declared"}, None),
    ],
)
def test_problems_are_named(changes: dict[str, Any], problem: str | None) -> None:
    declared = frozenset({"declared"})
    case = _cases.Case("a call", print, lambda *_: _cases.Call(()), mma_sync=declared, serialised=declared)
    found = list(_aot._problems(case, replace(_SOUND, **changes)))
    assert len(found) == (problem is not None)
    assert all(problem in text for text in found)
