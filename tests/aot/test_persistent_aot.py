"""The persistent step's machine code: the barrier as meant, weights in wide copies, all programs resident."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: compiling needs one without TRITON_INTERPRET.
_STEP = """
import json, re, subprocess, sys, tempfile
import torch
from gptkern.ops import _aot, _launch, _cases

def sass(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_aot._cuobjdump(), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

case = _cases.cases("decode_step")[0]
launches = _cases.record_case(case, torch.bfloat16, 90)
kernel = _aot.compile_launch(launches[0], 90)
print(json.dumps({
    "launches": [list(launch.grid) for launch in launches],
    "cooperative": kernel.metadata.launch_cooperative_grid,
    "ptx": kernel.asm["ptx"],
    "ttgir": kernel.asm["ttgir"],
    "code": re.findall(r"^\\s+/\\*\\w+\\*/\\s+(?:@!?U?P\\w+ )?([A-Z][\\w.]+)", sass(kernel), re.M),
}))
"""

_RESIDENT = """
import json
from gptkern.ops import _aot, _launch

found = []
for arch in _launch.ARCHS:
    rows = {row["dtype"]: row for row in _launch.table(arch)["persistent_step"]}
    for report in _aot.reports("decode_step", (arch,)):
        row = rows["fp32" if report.dtype == "float32" else "half"]
        name = f"sm_{arch}, {report.case}"
        wanted = row["PROGRAMS_PER_SM"]
        found.append([name, report.local_bytes, report.widest_load, report.blocks_per_sm, wanted])
print(json.dumps(found))
"""

_BARRIERS = """
import sys
sys.path.insert(0, "benchmarks")
import torch
import launch_cost_kernels as costs
from gptkern.ops import _aot, _launch

for arch in _launch.ARCHS:
    barrier = torch.empty(64, dtype=torch.int32, device="meta")
    options = {"num_warps": 4, "launch_cooperative_grid": True}
    launch = _launch.Launch(costs.barriers_kernel, (132,), (barrier, 101), options)
    assert "ld.acquire.gpu" in _aot.compile_launch(launch, arch).asm["ptx"]
    launch = _launch.Launch(costs.empty_kernel, (132,), (torch.empty(1, device="meta"),), {"PDL": arch >= 90})
    _aot.compile_launch(launch, arch)
print("compiled")
"""


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def step() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_run(_STEP))
    return found


@pytest.mark.slow
@pytest.mark.ci
def test_a_step_is_one_cooperative_launch(step: dict[str, Any]) -> None:
    assert step["launches"] == [[2 * 132]]
    assert step["cooperative"]


@pytest.mark.slow
@pytest.mark.ci
def test_the_barrier(step: dict[str, Any]) -> None:
    ptx, code = step["ptx"], step["code"]
    # Arrival, then the prefetch, then one spin of acquiring loads.
    assert ptx.count("ld.acquire.gpu") == 1
    arrival, spin = ptx.index("atom.global.gpu.release.add"), ptx.index("ld.acquire.gpu")
    assert arrival < ptx.index("prefetch.global.L2", arrival) < spin
    # All of a program's stores come before its release: threads meet, one fences and adds.
    added = next(i for i, name in enumerate(code) if name.startswith("REDG.E.ADD.STRONG.GPU"))
    fence = max(i for i, name in enumerate(code[:added]) if name.startswith("MEMBAR") and "GPU" in name)
    met = max(i for i, name in enumerate(code[:added]) if name.startswith("BAR.SYNC"))
    assert met < fence < added
    # One thread polls: its acquire empties the multiprocessor's L1, then all threads meet before it reads on.
    assert "@first ld.acquire.gpu" in ptx
    polls = [i for i, name in enumerate(code) if name.startswith("CCTL.IVALL") and i > added]
    spin = next(i for i in polls if code[i - 1].startswith("LDG.E.STRONG.GPU"))
    met = next(i for i, name in enumerate(code) if i > spin and name.startswith("BAR.SYNC"))
    assert not [name for name in code[spin + 1 : met] if name.startswith(("LDG", "LDS", "LD."))]
    # What other programs wrote in this launch must not come through the read-only cache.
    assert not [name for name in code if name.startswith("LDG") and "CONSTANT" in name]


@pytest.mark.slow
@pytest.mark.ci
def test_weights_are_copied_sixteen_bytes_at_a_time(step: dict[str, Any]) -> None:
    copies = [line for line in step["ttgir"].splitlines() if "async_copy_global_to_local %weight" in line]
    # Five linear layers, two stages ahead and one in the loop.
    assert len(copies) == 15
    assert all("contiguity = 8" in line for line in copies)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_programs_are_resident_and_nothing_spills() -> None:
    found = json.loads(_run(_RESIDENT))
    assert len(found) > 20
    for name, local_bytes, widest_load, resident, wanted in found:
        assert local_bytes == 0, name
        assert widest_load == 16, name
        assert resident >= wanted, name


@pytest.mark.slow
def test_the_launch_costs_compile() -> None:
    assert _run(_BARRIERS) == "compiled\n"
