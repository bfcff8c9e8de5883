"""What the build decides before it compiles anything, and what the built extension says of itself."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from gptkern import _C

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gptkern_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc(folder: Path) -> str:
    """A stand-in that knows two architectures."""
    path = folder / "nvcc"
    path.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    path.chmod(0o755)
    return str(path)


def test_architectures_are_those_that_the_compiler_knows(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("GPTKERN_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    assert setup.cuda_architectures(nvcc(tmp_path)) == "80-real;90-real;90-virtual"


def test_architectures_from_the_environment(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPTKERN_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX")
    assert setup.cuda_architectures(nvcc(tmp_path)) == "80-real;90-real;90-virtual"
    monkeypatch.setenv("GPTKERN_CUDA_ARCHS", "100;sm_120")
    assert setup.cuda_architectures(nvcc(tmp_path)) == "100-real;120-real"
    monkeypatch.setenv("GPTKERN_CUDA_ARCHS", "Hopper")
    with pytest.raises(SystemExit, match="Hopper"):
        setup.cuda_architectures(nvcc(tmp_path))


def test_the_switch(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GPTKERN_CUDA", raising=False)
    assert setup.find_nvcc() is None
    monkeypatch.setenv("GPTKERN_CUDA", "1")
    with pytest.raises(SystemExit, match="no nvcc"):
        setup.find_nvcc()
    compiler = nvcc(tmp_path)
    assert setup.find_nvcc() == compiler
    monkeypatch.setenv("GPTKERN_CUDA", "0")
    assert setup.find_nvcc() is None
    monkeypatch.setenv("GPTKERN_CUDA", "maybe")
    with pytest.raises(SystemExit, match="maybe"):
        setup.find_nvcc()


def test_the_metadata_declares_floors_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        # An extra may ask for another of gptkern's own.
        assert re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+|gptkern\[\w+\]", requirement), requirement


def test_the_tested_set_meets_the_floors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    version = lambda text: tuple(int(x) for x in re.findall(r"\d+", text))  # noqa: E731
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name, floor = requirement.split(">=")
        assert version(pinned[name]) >= version(floor), requirement


def test_the_extension_knows_itself() -> None:
    assert _C.cpu_path() in ("portable", "avx2")
    assert _C.has_cuda == bool(_C.cuda_archs)
    assert _C.max_vocab == 2**19
    with pytest.raises(ValueError, match="sse9"):
        _C.use_cpu_path("sse9")


def test_a_checkout_without_the_extension_says_so_once(tmp_path: Path) -> None:
    """Started inside the clone, Python imports the clone, whatever pip has installed elsewhere."""
    shutil.copytree(
        ROOT / "gptkern", tmp_path / "gptkern", ignore=shutil.ignore_patterns("_C*.so", "__pycache__")
    )
    (tmp_path / "csrc").mkdir()
    # Without site no other checkout that is installed for editing lends its extension.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout + done.stderr

    assert "gptkern" not in run("-c", "import gptkern")
    (tmp_path / "setup.py").touch()
    said = run("-c", "import gptkern, gptkern.config")
    assert said.count("is not built") == 1
    assert f"source checkout {tmp_path}" in said
    assert "`pip install -e .`" in said
