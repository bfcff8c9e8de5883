"""The loss's kernels for Hopper as compiled text: numbers, bits, orders of blocks, faults planted in them."""

from __future__ import annotations

import pytest
from ptx_loss_hopper import CALLS
from test_ptx_kernels import rows

SCRIPT = "ptx_loss_hopper.py"
KERNELS = ("logits_hopper", "dhidden_hopper", "dweight_hopper")
# Waits of the second warpgroup that nobody misses. Its place behind the first is an order of work; and for a
# tile's first pair the first warpgroup has waited before it gave that place.
MISSED = {
    "part 1: without mbarrier.wait(pipe.begun, turn & 1)",
    "part 1: without mbarrier.wait(pipe.full.index(stage), step // product.STAGES & 1)",
}


def check_calls(*numbers: int) -> set[str]:
    found = rows(SCRIPT, "calls", *numbers)
    assert len(found) == len(numbers or CALLS)
    assert [row["call"] for row in found if row["as_few"] is False] == []
    return {name for row in found for name in row["kernels"]}


def check_faults(kernel: str, every: int) -> set[str]:
    found = rows(SCRIPT, "faults", kernel, every, 0)
    missed = [row["fault"] for row in found if not row["caught"]]
    assert set(missed) <= MISSED and len(missed) <= len(MISSED), missed
    return {row["caught"] for row in found}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_some_calls_and_faults() -> None:
    assert set(KERNELS) < check_calls(list(CALLS).index("fp16, smoothed, bias"))
    assert len(check_faults("dweight_hopper", 8)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_call() -> None:
    check_calls()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_orders_of_blocks() -> None:
    found = rows(SCRIPT, "orders", 5)
    assert len(found) == 5 and all(row["same"] for row in found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_fault(kernel: str) -> None:
    assert {"barrier", "deadlock", "pending", "proxy"} <= check_faults(kernel, 1)
