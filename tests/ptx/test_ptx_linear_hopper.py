"""The product's kernel for Hopper as compiled text: numbers, bits, faults planted in it."""

from __future__ import annotations

import pytest
from ptx_linear_hopper import CALLS
from test_ptx_kernels import rows

SCRIPT = "ptx_linear_hopper.py"
# Work in an order, and no more: the second warpgroup could begin with the first.
ORDER = "mbarrier.wait(pipe.begun, turn & 1)"


def check_calls(*numbers: int) -> None:
    found = rows(SCRIPT, "calls", *numbers)
    assert len(found) == len(numbers or CALLS)
    for row in found:
        assert row["kernels"] in (["linear_hopper", "linear"], ["linear_hopper", "gated_linear"]), row
        assert row["as_other"] and row["as_few"], row


def check_faults(every: int) -> set[str]:
    found = rows(SCRIPT, "faults", every, 0)
    assert [row["fault"] for row in found if not row["caught"] and not row["fault"].endswith(ORDER)] == []
    assert not any(row["caught"] for row in found if row["fault"].endswith(ORDER))
    return {row["caught"] for row in found}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_some_calls_and_faults() -> None:
    check_calls(list(CALLS).index("one row"))
    assert len(check_faults(5)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_call() -> None:
    check_calls()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_fault() -> None:
    assert check_faults(1) == {"", "barrier", "deadlock", "pending", "proxy", "uninitialised"}
