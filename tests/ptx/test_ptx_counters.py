"""Counts of an execution against what is known of small kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ptx_support import module

from gptkern.bench import inspect, runs
from gptkern.bench.runs import Run
from gptkern.testing.ptx import Counters, execute
from gptkern.testing.ptx.counters import class_of


def counted(body: str, *tensors: torch.Tensor, threads: int = 32, blocks: int = 1) -> Counters:
    counters = Counters()
    text = module(body, len(tensors), threads)
    execute(text, (blocks,), tensors, shared_bytes=8192, counters=counters)
    return counters


@pytest.mark.parametrize(
    ("stride", "size", "sectors", "fewest"),
    [
        (4, 4, 4, 4),  # 32 floats side by side
        (8, 4, 8, 4),  # every second one
        (32, 4, 32, 4),  # one a sector
        (128, 4, 32, 4),
        (0, 4, 1, 1),  # all read one
        (16, 16, 16, 16),
        (32, 16, 32, 16),
        (2, 2, 2, 2),
    ],
)
def test_sectors_of_a_strided_load(stride: int, size: int, sectors: int, fewest: int) -> None:
    register = {2: "%rs1", 4: "%r1", 16: "{%r1, %r2, %r3, %r4}"}[size]
    load = {2: "ld.global.b16", 4: "ld.global.b32", 16: "ld.global.v4.b32"}[size]
    body = f"mul.wide.u32 %rd5, %r0, {stride}; add.s64 %rd5, %rd5, %rd0; {load} {register}, [%rd5];"
    data = torch.zeros(4096, dtype=torch.int64)
    shift = -data.data_ptr() % 128  # the tensor begins at a line
    found = counted(body, data.view(torch.uint8)[shift:])
    assert found.total("global") == (32 * size, sectors, fewest)
    (access,) = found.accesses.values()
    assert (access.requests, access.space) == (1, "global")


def test_a_load_across_the_sectors_borders_takes_one_more() -> None:
    data = torch.zeros(4096, dtype=torch.int64)
    shift = -data.data_ptr() % 128 + 16
    body = "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0; ld.global.b32 %r1, [%rd5];"
    assert counted(body, data.view(torch.uint8)[shift:]).total("global") == (128, 5, 4)


def test_lanes_that_are_switched_off_ask_for_nothing() -> None:
    body = """setp.lt.u32 %p1, %r0, 8; mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0;
    @%p1 ld.global.b32 %r1, [%rd5]; setp.lt.u32 %p2, %r0, 0; @%p2 ld.global.b32 %r1, [%rd5];"""
    data = torch.zeros(64, dtype=torch.int64)
    shift = -data.data_ptr() % 32
    found = counted(body, data.view(torch.uint8)[shift:], threads=64)
    assert found.total("global") == (32, 1, 1)
    assert found.instructions["global load"] == 1


def stored(address: str, size: int = 4, threads: int = 32) -> tuple[int, int, int]:
    values = {4: "%r9", 8: "{%r9, %r9}", 16: "{%r9, %r9, %r9, %r9}"}[size]
    vector = {4: "", 8: ".v2", 16: ".v4"}[size]
    body = f"mov.b32 %r9, 0; {address} st.shared{vector}.b32 [%r1], {values};"
    return counted(body, torch.zeros(1), threads=threads).total("shared")


@pytest.mark.parametrize(
    ("stride", "size", "wavefronts", "fewest"),
    [
        (4, 4, 1, 1),
        (8, 4, 2, 1),  # two words a bank
        (128, 4, 32, 1),  # all in one bank
        (132, 4, 1, 1),  # a row padded by a word: a bank each
        (0, 4, 1, 1),  # one word for all
        (8, 8, 2, 2),  # two halves of a warp
        (16, 16, 4, 4),  # four quarters
        (128, 16, 32, 4),
    ],
)
def test_bank_conflicts_of_a_stride(stride: int, size: int, wavefronts: int, fewest: int) -> None:
    assert stored(f"mul.lo.u32 %r1, %r0, {stride};", size) == (32 * size, wavefronts, fewest)


def test_a_swizzle_has_no_conflicts_where_a_plain_column_has() -> None:
    """Eight rows of 128 bytes: lane l writes 16 bytes to row l % 8, at column l / 8."""
    column = "and.b32 %r2, %r0, 7; shr.u32 %r3, %r0, 3; shl.b32 %r4, %r2, 7;"
    assert stored(f"{column} shl.b32 %r3, %r3, 4; add.u32 %r1, %r4, %r3;", 16) == (512, 32, 4)
    swizzle = "xor.b32 %r3, %r3, %r2; shl.b32 %r3, %r3, 4; add.u32 %r1, %r4, %r3;"
    assert stored(f"{column} {swizzle}", 16) == (512, 4, 4)


def test_matrix_loads_are_counted_by_rows() -> None:
    fill = "shl.b32 %r1, %r0, 4; st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};"
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r1];"
    found = counted(f"{fill} bar.warp.sync -1; {load}", torch.zeros(1))
    (access,) = (access for access in found.accesses.values() if access.instruction.startswith("ldmatrix"))
    assert (access.bytes, access.units, access.fewest) == (512, 4, 4)
    assert found.instructions["shared load"] == 1


def test_atomics_of_one_word_go_one_after_another() -> None:
    clear = "mov.b32 %r1, 0; setp.eq.b32 %p1, %r0, 0; @%p1 st.shared.b32 [%r1], %r1; bar.sync 0;"
    found = counted(f"{clear} atom.shared.add.u32 %r2, [%r1], 1;", torch.zeros(1))
    (access,) = (access for access in found.accesses.values() if access.instruction.startswith("atom"))
    assert (access.units, access.fewest) == (32, 1)


def test_products_barriers_and_waits() -> None:
    registers = ", ".join(f"%r{i}" for i in range(10, 14))
    zeros = "".join(f"mov.b32 %r{i}, 0;" for i in range(10, 20))
    product = f"""mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{registers}}}, {{{registers}}},
        {{%r14, %r15}}, {{{registers}}};""".replace("\n", " ")
    wait = "cp.async.commit_group; cp.async.wait_group 0; griddepcontrol.wait;"
    found = counted(f"{zeros} {product} bar.sync 0; bar.sync 0; {wait}", torch.zeros(1), threads=64, blocks=3)
    assert found.operations == 3 * 2 * 2 * 16 * 8 * 16
    assert found.instructions["matrix"] == 6
    assert found.instructions["barrier"] == 12
    assert found.instructions["wait"] == 12


def test_bytes_that_are_moved_count_once() -> None:
    """Each block reads the same 32 numbers twice and writes its own."""
    body = """mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd5, %rd0; ld.global.b32 %r1, [%rd6];
    ld.global.b32 %r1, [%rd6 + 0]; mov.u32 %r3, %ctaid.x; mad.lo.u32 %r3, %r3, 32, %r0;
    mul.wide.u32 %rd7, %r3, 4; add.s64 %rd7, %rd7, %rd1; st.global.b32 [%rd7], %r1;"""
    found = counted(body, torch.zeros(32), torch.zeros(64), blocks=2)
    assert (found.read, found.written, found.launches) == (128, 256, 1)
    assert found.total("global")[0] == 2 * 2 * 128 + 256


@pytest.mark.parametrize(
    ("opcode", "label"),
    [
        ("ld.global.v4.b32", "global load"),
        ("st.shared::cluster.b32", "shared store"),
        ("ld.param.u64", "param load"),
        ("ld.u32", "generic load"),
        ("atom.global.gpu.acq_rel.add.u32", "global atomic"),
        ("cp.async.cg.shared.global", "asynchronous copy"),
        ("cp.async.wait_group", "wait"),
        ("mbarrier.try_wait.parity.shared::cta.b64", "wait"),
        ("mbarrier.arrive.shared::cta.b64", "barrier"),
        ("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16", "matrix"),
        ("wgmma.wait_group.sync.aligned", "wait"),
        ("ex2.approx.f32", "special function"),
        ("div.full.f32", "special function"),
        ("div.s32", "integer"),
        ("fma.rn.bf16x2", "float"),
        ("setp.lt.f32", "float"),
        ("shfl.sync.bfly.b32", "warp exchange"),
        ("bra.uni", "branch"),
    ],
)
def test_classes_of_instructions(opcode: str, label: str) -> None:
    assert class_of(opcode) == label


# --- gptkern inspect --run


RUN = Run(
    "norm", "3 x 17", "bfloat16", "forward", 90, launches=1, instructions={"float": 4, "wait": 1},
    operations=0, read=96, written=32, requested=160, sectors=10, fewest_sectors=5,
    wavefronts=0, fewest_wavefronts=0,
)  # fmt: skip


def test_changed_counts_are_named() -> None:
    slower = replace(RUN, instructions={"float": 4, "barrier": 2}, sectors=20)
    other = replace(RUN, case="5 x 1")
    title = "forward sm_90 bfloat16 (3 x 17) executed"
    assert runs.diff([RUN, other], [RUN]) == []
    assert runs.diff([RUN], [slower, other]) == [
        f"~ {title}: barrier instructions 0 -> 2, wait instructions 1 -> 0, sectors 10 -> 20",
        f"+ {title.replace('3 x 17', '5 x 1')}",
    ]


def test_counts_are_saved_beside_the_reports(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    inspect.save([], path, inspect.merged_runs([RUN, replace(RUN, case="5 x 1")], [replace(RUN, sectors=7)]))
    assert [(run.case, run.sectors) for run in inspect.load_runs(path)] == [("3 x 17", 7), ("5 x 1", 10)]
    assert inspect.load(path)[0] == []
    inspect.save([], path)
    assert inspect.load_runs(path) == []
    path.write_text('{"runs": [{"op": "norm"}]}')
    with pytest.raises(ValueError, match="not a report of gptkern inspect"):
        inspect.load_runs(path)


def test_the_table_has_the_floor_beside_the_counts() -> None:
    line = runs.table([RUN], {90: (1e9, 1e12)}).splitlines()[2]
    words = ["forward", "1", "5", "0 MFLOP", "0", "1", "128 B", "128 ns", "160 B", "10 (2.00)", "none"]
    assert re.split(r"\s{2,}", line.strip()) == words


@pytest.mark.parametrize(
    ("ops", "archs", "message"),
    [
        ([], (90,), "name at least one"),
        (["layer_norm"], (100,), "--run executes sm_80, sm_89 and sm_90; got --arch 100"),
        (["nothing"], (90,), "there is no op 'nothing'; there are"),
    ],
)
def test_a_run_that_is_not_served_is_refused(ops: list[str], archs: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs.executed_runs(ops, archs, 1)


def test_the_command_executes_and_counts(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "gptkern", "inspect", "layer_norm", "--run", "--calls", "1"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, "--save", str(report)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("layer_norm, layer_norm (3, 17), bfloat16, sm_90\nkernel ")
    found = {run.kernel: run for run in inspect.load_runs(report)}
    # 3 rows of 17 numbers, weight and bias are read; the rows and two statistics of each are written.
    forward = found["norm_forward_kernel"]
    assert (forward.read, forward.written) == (2 * (51 + 17 + 17), 2 * 51 + 4 * 2 * 3)
    assert forward.instructions["global load"] > 0 and forward.operations == 0
