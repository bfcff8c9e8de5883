"""The backward products' kernels for Hopper as compiled text: numbers, bits, faults planted in them."""

from __future__ import annotations

import pytest
from ptx_linear_hopper_backward import CALLS, FAULTS
from test_ptx_kernels import rows
from test_ptx_linear_hopper import ORDER

SCRIPT = "ptx_linear_hopper_backward.py"
PAIRS = (
    {"linear_dact_hopper", "linear_dact"},
    {"linear_dact_hopper", "gated_linear_dact"},
    {"linear_dw_hopper", "linear_dw"},
)


def check_calls(*names: str) -> None:
    found = rows(SCRIPT, "calls", *map(list(CALLS).index, names))
    assert len(found) == len(names or CALLS)
    for row in found:
        assert set(row["kernels"]) - {"column_sum"} in PAIRS, row
        assert row["as_other"] and row["orders"] and row.get("as_few", True), row


def check_faults(name: str, every: int) -> set[str]:
    found = rows(SCRIPT, "faults", name, every, 0)
    assert [row["fault"] for row in found if not row["caught"] and not row["fault"].endswith(ORDER)] == []
    assert not any(row["caught"] for row in found if row["fault"].endswith(ORDER))
    return {row["caught"] for row in found}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_some_calls_and_faults() -> None:
    check_calls("relu, 65 rows", "weight, one sum")
    assert len(check_faults("gelu", 5)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_call() -> None:
    check_calls()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault(name: str) -> None:
    assert check_faults(name, 1) == {"", "barrier", "deadlock", "pending", "proxy", "uninitialised"}
