"""The package's own kernels as compiled text: every small call of every op, and faults planted in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

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
    return [f"{row['op']}, {row['case']}: {row['failure']}" for row in found if row["failure"]]


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


# How many mutations change nothing that a GPU could notice.
HARMLESS = {
    # Nothing was in shared memory before the first.
    ("norm_forward_kernel", "without bar.sync \t0;"): 1,
}


def test_planted_faults_are_caught() -> None:
    found = rows("ptx_mutations.py", 90, "linear", "norm")
    missed = Counter((row["kernel"], row["mutation"]) for row in found if not row["caught"])
    assert missed == HARMLESS
    assert {row["caught"] for row in found} >= {"race", "pending", "proxy", "bounds"}
    assert sum(bool(row["caught"]) for row in found) >= 15
