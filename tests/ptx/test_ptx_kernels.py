"""The package's own kernels as compiled text: every small call of every op, and faults planted in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ptx_fault_calls
import ptx_forms
import ptx_orders
import ptx_table
import pytest
import triton

from gptkern.ops import _cases

HERE = Path(__file__).parent


def rows(script: str, *args: object) -> list[dict[str, Any]]:
    """The lines that a script prints, in a process in which kernels are compiled and not interpreted."""
    command = [sys.executable, str(HERE / script), *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def failures(found: list[dict[str, Any]]) -> list[str]:
    """What failed, and forms of instructions of which no test has an answer."""
    failed = [f"{row['op']}, {row['case']}: {row['failure']}" for row in found if row["failure"]]
    unknown = {form for row in found for form in row["forms"]} - ptx_forms.known()
    return failed + [f"{form} has no answer in ptx_forms.py" for form in sorted(unknown)]


@pytest.mark.parametrize("arch", [80, 90])
def test_one_call_of_some_ops(arch: int) -> None:
    found = rows("ptx_kernels.py", arch, "--most", 1, "linear", "decode_linear")
    assert failures(found) == []
    launched = {name for row in found for name in row["kernels"]}
    assert launched >= {"linear", "linear_dw", "decode_linear_kernel"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("op", [op for op in _cases.ops() if _cases.checks(op)])
def test_every_small_call(op: str, arch: int) -> None:
    found = rows("ptx_kernels.py", arch, op)
    assert found and failures(found) == []
    table = ptx_table.listed()
    assert all(table[name][arch] for row in found for name in row["kernels"])


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("arch", [80, 90])
def test_a_persistent_step(arch: int) -> None:
    assert failures(rows("ptx_steps.py", arch, "gpt2")) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_persistent_steps_of_other_families_and_formats() -> None:
    found = rows("ptx_steps.py", 90, "llama", "qwen3", "wide", "int8", "int4", "fp8")
    assert len(found) == 6 and failures(found) == []


@pytest.mark.parametrize("arch", [80, 90])
def test_the_table_lists_every_kernel(arch: int) -> None:
    (launched,) = rows("ptx_table.py", "launched", arch)
    table = ptx_table.listed()
    assert set(launched) == {name for name in table if table[name][arch]}


# --- orders of blocks


def test_three_orders_of_blocks() -> None:
    found = rows("ptx_orders.py", 90, 3, "decode", "few bits", "decode_attention", "norm", "rotary")
    assert {row["kernel"] for row in found} >= {
        "decode_linear_kernel",
        "decode_attention_kernel",
        "norm_backward_kernel",
        "rotary_norm_backward_kernel",
    }
    assert all(row["blocks"] > 1 and row["differ"] == [] for row in found)


@pytest.mark.slow
@pytest.mark.ci
def test_three_orders_of_blocks_of_a_persistent_step() -> None:
    (found,) = rows("ptx_orders.py", 90, 3, "wide")
    assert found["kernel"] == "persistent_step_kernel" and found["blocks"] > 1 and found["differ"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", [*ptx_orders.CALLS, *ptx_orders.STEPS])
def test_fifty_orders_of_blocks(name: str, arch: int) -> None:
    found = rows("ptx_orders.py", arch, 50, name)
    assert found and all(row["differ"] == [] for row in found)


# --- planted faults


def planted(name: str, arch: int) -> None:
    """Plant a call's faults: each is caught, or not, as the committed table says if it has the call."""
    found = rows("ptx_mutations.py", arch, name)
    caught = [row for row in found if ptx_table.noticed(row)]
    assert len(caught) >= 5
    table = ptx_table.TABLE.read_text()
    if f"Triton {triton.__version__}" not in table or f"\n| {name} | sm_{arch} |" not in table:
        return  # another compiler has other instructions
    for row in found:
        line = ptx_table.caught_line(row) if row in caught else ptx_table.missed_line(row)
        assert line.rstrip("\n") in table, row


def test_planted_faults_are_caught() -> None:
    planted("append", 80)
    planted("embed", 90)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ptx_fault_calls.CALLS)
def test_every_planted_fault_is_caught(name: str, arch: int) -> None:
    planted(name, arch)
