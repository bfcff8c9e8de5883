"""Attention's backward kernels for Hopper as compiled text: numbers, orders of blocks, turns."""

from __future__ import annotations

import re

import pytest
from ptx_attention_hopper_backward import CALLS, KERNELS, OUTSIDE
from test_ptx_kernels import rows

SCRIPT = "ptx_attention_hopper_backward.py"
# Faults that change nothing, or nothing in the order of warps that is executed; docs/proof.md has each: waits
# for what other waits imply, fences that have another behind them, ends of groups that a later end makes.
HIDDEN = re.compile(r"wait\(ds_empty\.index|fence\.proxy|wgmma\.commit_group|wgmma\.wait_group.* 0;$")


def check_calls(*numbers: int) -> None:
    found = rows(SCRIPT, "calls", *numbers)
    assert len(found) >= len(numbers or CALLS)
    for row in found:
        assert row["kernels"] == [*KERNELS, *(OUTSIDE if "packed" in row["call"] else ())], row
        assert row["failure"] == "", row


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_a_call() -> None:
    check_calls(list(CALLS).index("packed, NaN beside"))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_sequences_longer_than_promised_hold_nobody_up() -> None:
    """A tile's turn at dq has no counter where there was no room for its queries: nothing waits for it."""
    found = rows(SCRIPT, "promised")
    assert found == [{"gradient": name, "same": True, "nan": True} for name in ("dq", "dk", "dv")]


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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_arrivals_and_waits_that_are_missing_are_noticed() -> None:
    found = rows(SCRIPT, "faults", 1, 0)
    assert [row["fault"] for row in found if not row["caught"] and not HIDDEN.search(row["fault"])] == []
    assert sum(bool(row["caught"]) for row in found) >= 173
    assert {row["caught"] for row in found} >= {"deadlock", "pending", "race", "proxy"}
