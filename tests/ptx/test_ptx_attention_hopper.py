"""Attention's kernel for Hopper as compiled text: numbers, NaN beside a sequence, faults planted in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ptx_attention_hopper import CALLS, installed
from test_ptx_kernels import rows

SCRIPT = "ptx_attention_hopper.py"
# Both warpgroups may issue at once: they would only meet more often.
TURNS = "mbarrier.wait(turns.index(WARPGROUP), (step & 1) ^ (1 - WARPGROUP))"
# The first warpgroup has waited for them before it gave the turn on.
IMPLIED = ("q_full", "k_full", "v_full")


def check_calls(*numbers: int) -> None:
    found = rows(SCRIPT, "calls", *numbers)
    assert len(found) >= len(numbers or CALLS)
    for row in found:
        outside = ["flash_attention_outside"] if "packed" in row["call"] else []
        assert row["kernels"] == ["flash_attention_forward_hopper", *outside], row
        # Of the rounding of out alone; weights are rounded, too.
        assert row["error"] <= 2 and row["lse"] <= 1e-6, row


def harmless(fault: str) -> bool:
    implied = fault.startswith("part 1: without mbarrier.wait") and any(name in fault for name in IMPLIED)
    return fault.endswith(TURNS) or implied


def check_faults(every: int) -> list[dict[str, Any]]:
    found = rows(SCRIPT, "faults", every, 0)
    assert [row["fault"] for row in found if not row["caught"] and not harmless(row["fault"])] == []
    assert not any(row["caught"] for row in found if harmless(row["fault"]))
    return found


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_some_calls_and_faults() -> None:
    check_calls(list(CALLS).index("packed, NaN beside"))
    assert len(check_faults(12)) >= 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_call() -> None:
    check_calls()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_fault() -> None:
    found = check_faults(1)
    assert len(found) >= 90
    assert {row["caught"] for row in found} >= {"deadlock", "pending", "race", "proxy"}


@pytest.mark.parametrize("name", ["gptkern/gptkern/ops/linear/op.py", "gptkern/env/triton/language/core.py"])
def test_a_source_of_a_checkout_that_is_gone_is_read_here(name: str) -> None:
    found = installed(f"/gone/{name}")
    assert found.is_file() and found.parts[-3:] == Path(name).parts[-3:]
