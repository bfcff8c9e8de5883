"""Attention's backward kernels for Hopper as compiled text: numbers, orders of blocks, turns."""

from __future__ import annotations

import pytest
from ptx_attention_hopper_backward import CALLS, KERNELS
from test_ptx_kernels import rows

SCRIPT = "ptx_attention_hopper_backward.py"


def check_calls(*numbers: int) -> None:
    found = rows(SCRIPT, "calls", *numbers)
    assert len(found) >= len(numbers or CALLS)
    for row in found:
        assert row["kernels"] == list(KERNELS) and row["failure"] == "", row


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_a_call() -> None:
    check_calls(list(CALLS).index("packed, NaN beside"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_call() -> None:
    check_calls()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["more keys than queries", "packed, head dim 128, window"])
def test_every_order_leaves_the_same_bits(name: str) -> None:
    found = rows(SCRIPT, "orders", list(CALLS).index(name), 12)
    assert [row["seed"] for row in found if row["same"]] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_turns_that_are_not_kept_are_a_race() -> None:
    """A wait that does not acquire, gifts that do not release, no wait at all."""
    found = rows(SCRIPT, "turns")
    assert len(found) == 4 and {row["caught"] for row in found} == {"race"}
