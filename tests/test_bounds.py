"""Kernels' addresses for all sizes: the solver's claims hold, and planted faults break the right one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("z3")

from bounds_run import FAULTS

from gptkern.ops import _cases
from gptkern.testing.bounds import BEYOND, SPECS

HERE = Path(__file__).parent
QUICK = [
    "norm_weight_grad_kernel",
    "norm_wide_forward_kernel",
    "norm_wide_backward_kernel",
    "append_kv_kernel",
]
CLAIM = {
    "a row too many": "bounds",
    "rows twice": "race",
    "offsets in int32": "int32",
    "a column too many": "bounds",
    "all programs own one token": "bounds",
    "parts in one place": "race",
}


def lines(*command: str) -> list[dict]:
    """What a process prints in which kernels are compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=kept, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.ci
def test_quick_kernels() -> None:
    found = lines("-m", "gptkern.testing.bounds", *QUICK)
    assert [line["kernel"] for line in found] == QUICK
    assert all(line["accesses"] >= 4 and line["findings"] == [] for line in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SPECS if name not in QUICK])
def test_all_kernels(name: str) -> None:
    (found,) = lines("-m", "gptkern.testing.bounds", name)
    assert found["findings"] == []


@pytest.mark.slow
@pytest.mark.ci
def test_a_planted_fault() -> None:
    (found,) = lines(str(HERE / "bounds_run.py"), "parts in one place")
    assert CLAIM["parts in one place"] in found["claims"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAULTS))
def test_planted_faults(name: str) -> None:
    (found,) = lines(str(HERE / "bounds_run.py"), name)
    assert CLAIM[name] in found["claims"]


@pytest.mark.slow
@pytest.mark.ci
def test_every_kernel_is_asked_or_says_why_not() -> None:
    script = (
        "import torch; from gptkern.ops import _cases\n"
        "for op in _cases.ops():\n"
        "    for case in _cases.cases(op):\n"
        "        names = [launch.name for launch in _cases.record_case(case, case.dtypes[0], 90)]\n"
        "        for name in names: print(chr(34) + name + chr(34))\n"
    )
    names = {str(name) for name in lines("-c", script)}
    assert names == set(SPECS) | set(BEYOND)
    assert not set(SPECS) & set(BEYOND)
    assert {spec.case[0] for spec in SPECS.values()} <= set(_cases.ops())
