"""What makes the decode step fast, seen in its machine code: wide loads, early prefetch, one wait."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: compiling needs one without TRITON_INTERPRET.
_INSPECT = """
import json, sys
import torch
from gptkern.ops import _aot, _cases

found = []
for op, name in json.loads(sys.argv[1]):
    case = next(s for s in _cases.cases(op) if s.name == name)
    launch = _cases.record_case(case, torch.bfloat16, 90)[0]
    report = _aot.inspect(op, case, torch.bfloat16, launch, 90)
    found.append([report.widest_load, report.local_bytes, _aot.compile_launch(launch, 90).asm["ptx"]])
print(json.dumps(found))
"""

_CALLS = [
    ("decode_linear", "124M qkv"),
    ("decode_linear", "124M out"),
    ("decode_linear", "124M proj"),
    ("decode_linear", "124M head"),
    ("decode_attention", "124M step"),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_stream_wide_and_before_the_wait() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _INSPECT, json.dumps(_CALLS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for call, (widest_load, local_bytes, ptx) in zip(_CALLS, json.loads(done.stdout), strict=True):
        assert widest_load == 16, call
        assert local_bytes == 0, call
        wait = ptx.index("griddepcontrol.wait")
        assert 0 < ptx.index("prefetch.global.L2") < wait < ptx.index("griddepcontrol.launch_dependents"), (
            call
        )
        # All else that is read comes after the wait, but for the lengths and pages that say what to prefetch.
        if call[0] == "decode_linear":
            assert "ld.global" not in ptx[:wait], call
            assert "cp.async" not in ptx[:wait], call


_LAYOUTS = """
import json, re
import torch
from gptkern.ops import _aot, _cases
from gptkern.ops.decode_linear import decode_linear

found = []
for outputs in (3072, 50257):
    for rows in (1, 17, 64):
        def make(device, dtype):
            shapes = (rows, 768), (outputs, 768), (768,)
            x, weight, scale = (torch.empty(s, device=device, dtype=dtype) for s in shapes)
            return _cases.Call((x, weight), {"norm": (scale, scale, 1e-5)})

        case = _cases.Case("rows", decode_linear, make)
        launch = _cases.record_case(case, torch.bfloat16, 90)[0]
        ttgir = _aot.compile_launch(launch, 90).asm["ttgir"]
        layouts = dict(re.findall(r"^(#\\w+) = (.*)$", ttgir, re.M))
        sums = {layouts[name] for name in re.findall(r"\\}\\) : \\(tensor<\\S+, (#\\w+)>", ttgir)}
        (mma,) = [layout for layout in layouts.values() if "nvidia_mma" in layout]
        version = re.search(r"versionMajor = (\\d)", mma).group(1)
        depth = re.search(r"instrShape = \\[([^]]*)\\]", mma).group(1).split(", ")[2:]
        found.append([sorted(sums), version, depth])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_number_of_rows_changes_no_order_of_sums() -> None:
    """16, 32 and 64 rows a program: the same layout of a row's sums, the same matrix instruction along k."""
    done = subprocess.run(
        [sys.executable, "-c", _LAYOUTS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    for group in (found[:3], found[3:]):
        assert group[0][0], "no sums were found"
        assert group[0] == group[1] == group[2]
