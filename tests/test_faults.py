"""No failing write, flush, rename, opening, allocation or thread start loses anything in silence.

Each fault leaves the old state whole, or the new one, and an error that says so (``fault_run.py``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DISK = "write,full disk,short write,flush,rename"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail, built by the compiler at hand."""
    compiler = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, HERE / "faults.cpp", "-o", path, "-ldl"], check=True)
    return path


def faults(library: Path, folder: Path, scenarios: str, kinds: str, every: int) -> dict[str, dict[str, int]]:
    """How often a fault ended in which way, over all scenarios, by kind."""
    done = subprocess.run(
        [sys.executable, HERE / "fault_run.py", folder / "work", scenarios, kinds, str(every)],
        env={
            "PYTHONPATH": str(HERE.parent),
            "PATH": os.environ.get("PATH", ""),
            "OMP_NUM_THREADS": "1",
            "LD_PRELOAD": str(library),
        },
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    total: dict[str, dict[str, int]] = {kind: {} for kind in kinds.split(",")}
    for found in json.loads(done.stdout).values():
        for kind, ends in found.items():
            for end, count in ends.items():
                total[kind][end] = total[kind].get(end, 0) + count
    return total


def test_faults_of_the_disk(library: Path, tmp_path: Path) -> None:
    found = faults(library, tmp_path, "save,tokens,file", DISK, 3)
    assert found["short write"].keys() == {"done"}
    for kind in ("write", "full disk", "flush", "rename"):
        assert found[kind].keys() == {"raised"}
        assert found[kind]["raised"] >= 4


def test_faults_of_memory_and_threads(library: Path, tmp_path: Path) -> None:
    found = faults(library, tmp_path, "save,sample", "allocation,open,start", 12)
    assert found["allocation"]["raised"] > 2
    assert found["open"]["raised"] > 2


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("scenario", ["save", "shards", "quantise", "training", "tokens", "file", "sample"])
def test_every_fault(scenario: str, library: Path, tmp_path: Path) -> None:
    found = faults(library, tmp_path, scenario, f"{DISK},allocation,open,start", 1)
    assert sum(found["short write"].values()) == found["short write"].get("done", 0)
    if scenario != "sample":
        assert all(found[kind]["raised"] > 0 for kind in ("write", "full disk", "flush", "rename", "open"))
