"""Kernel tests make their tensors where ``device`` says: on a machine with a GPU, on the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Of arguments, which are checked before anything is launched, and of what a CPU alone does.
OF_NO_KERNEL = {
    "test_bad_arguments",
    "test_bad_arguments_are_named",
    "test_bad_caches_are_named",
    "test_bad_packing",
    "test_lengths_beyond_the_pages_are_refused_on_a_cpu",
    "test_offsets_beyond_int32",
}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_no_kernel_test_gives_a_kernel_cpu_tensors(tmp_path: Path) -> None:
    """With a stand-in; see ``gpu_stand_in``. The sampler and the dispatch are tested on the CPU."""
    found = tmp_path / "found.json"
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "TRITON_INTERPRET": "0",
        "GPU_STAND_IN": str(found),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "gpu_stand_in",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
    ]
    chosen = [
        "-m",
        "kernels and not slow and not gpu",
        "--ignore-glob=*test_sample*",
        "--ignore-glob=*test_dispatch*",
        str(HERE),
    ]
    done = subprocess.run(
        [*command, "-q", "--tb=no", *chosen],
        cwd=HERE.parent,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert found.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    tests = json.loads(found.read_text())
    assert tests["refused"] == tests["mixed"] == []
    # Here the reference would run instead, and pass.
    silent = {name.partition("::")[2].partition("[")[0] for name in tests["silent"]}
    assert silent <= OF_NO_KERNEL
    assert len(tests["reached"]) > 500
