"""docs/add-an-op.md is true: the op that it adds, file by file, passes its tests and compiles."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, files

FILES = files((ROOT / "docs" / "add-an-op.md").read_text())
TABLES = "gptkern/ops/tables/sm*.toml"
DEGENERATE = "tests/ops/test_degenerate.py"
ROWS = f"{DEGENERATE}, in ROWS"
SIX = {"reference.py", "kernels.py", "launch.py", "register.py", "op.py", "cases.py"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of the tests' shared part, with what the page adds."""
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gptkern", copy / "gptkern", ignore=ignored)
    (copy / "tests" / "ops").mkdir(parents=True)
    for name in (
        "pyproject.toml",
        "tests/conftest.py",
        "tests/test_bench.py",
        "tests/ops/test_layout.py",
        DEGENERATE,
    ):
        shutil.copy(ROOT / name, copy / name)
    for table in copy.glob(TABLES):
        table.write_text(f"{table.read_text()}\n{FILES[TABLES]}")
    for name, text in FILES.items():
        if name not in (TABLES, ROWS):
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_text(text)
    degenerate = copy / DEGENERATE
    start = "ROWS: dict[str, list[Row]] = {\n"
    degenerate.write_text(degenerate.read_text().replace(start, start + FILES[ROWS]))
    names = copy / "gptkern" / "ops" / "__init__.py"
    text = names.read_text().replace(
        "__all__ = [", 'from gptkern.ops.swiglu import swiglu\n\n__all__ = ["swiglu",'
    )
    names.write_text(text)
    suites = copy / "gptkern" / "bench" / "suites" / "__init__.py"
    suites.write_text(suites.read_text().replace("OPS = (", 'OPS = ("swiglu",'))
    return copy


def run(tree: Path, *arguments: str) -> str:
    """What a command prints in the copy, which must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "120"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=False, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_page_has_the_six_files() -> None:
    assert {Path(name).name for name in FILES if name.startswith("gptkern/ops/swiglu/")} == {
        *SIX,
        "__init__.py",
    }


@pytest.mark.slow
@pytest.mark.ci
def test_its_files_are_clean(tree: Path) -> None:
    run(tree, "-m", "ruff", "check", *(name for name in FILES if name.endswith(".py")))


@pytest.mark.slow
@pytest.mark.ci
def test_its_tests_pass(tree: Path) -> None:
    own, layout = "tests/ops/test_swiglu.py", "tests/ops/test_layout.py"
    assert " passed" in run(tree, "-m", "pytest", "-q", "-n", "0", own, layout)


@pytest.mark.slow
@pytest.mark.ci
def test_the_suites_tests_take_it_in(tree: Path) -> None:
    """Its rows of empty shapes are computed, and the command's help names its suite."""
    for file, some, count in (
        (DEGENERATE, "swiglu or every_op", 7),
        ("tests/test_bench.py", "names_every", 1),
    ):
        assert f"{count} passed" in run(tree, "-m", "pytest", "-q", "-n", "0", file, "-k", some)


@pytest.mark.slow
@pytest.mark.ci
def test_its_kernels_compile_without_a_spill(tree: Path) -> None:
    printed = run(tree, "-m", "gptkern", "inspect", "swiglu", "--per", "row", "--arch", "90")
    assert len(re.findall(r"swiglu_(?:forward|backward)_kernel", printed)) == 3


@pytest.mark.slow
@pytest.mark.ci
def test_its_benchmark_runs(tree: Path, tmp_path: Path) -> None:
    run(tree, "-m", "gptkern", "bench", "swiglu", "--quick", "--out", str(tmp_path / "report"))
    assert "swiglu" in (tmp_path / "report" / "results.md").read_text()
