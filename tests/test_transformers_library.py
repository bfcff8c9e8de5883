"""transformers' own tests of a model, run on the accelerated classes.

They come from the library's source distribution, fetched when the test runs. Two mixins that they import
are not in it; empty classes stand in.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

HERE = Path(__file__).parent
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def library_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library's tests as a package, ours among them."""
    folder = tmp_path_factory.mktemp("library")
    wanted = f"transformers=={transformers.__version__}"
    source = [
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        "-d",
        str(folder),
        wanted,
    ]
    helper = ["install", "--no-deps", "--target", str(folder / "site"), "parameterized"]
    for arguments in (source, helper):
        done = subprocess.run([*PIP, *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the registry gave no {arguments[-1]}: {done.stderr.strip()[-200:]}")
    archive = next(folder.glob("transformers-*.tar.gz"))
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if re.fullmatch(r"[^/]+/tests/[^/]+\.py", m.name)]
        tar.extractall(folder, members=members, filter="data")
    tests = next(folder.glob("transformers-*/tests"))
    for name, text in STUBS.items():
        (tests / name).parent.mkdir()
        (tests / name).write_text(text)
        (tests / name).with_name("__init__.py").touch()
    (tests / "__init__.py").touch()
    (tests / "test_gptkern.py").write_text((HERE / "transformers_model_tests.py").read_text())
    return tests.parent


def outcome(folder: Path, classes: str) -> tuple[set[str], int, int]:
    """(what failed, tests passed, subtests passed) with the classes of a module."""
    paths = [str(HERE.parent), str(folder.parent / "site"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"GPTKERN_CLASSES": classes, "PYTHONPATH": os.pathsep.join(paths)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        ".",
        "tests/test_gptkern.py",
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    # Without the reason, which holds numbers and class paths.
    failed = {
        line.split(" - ")[0] for line in done.stdout.splitlines() if re.match(r"(SUB)?FAILED|ERROR", line)
    }
    counts = {
        kind: int(n)
        for n, kind in re.findall(r"(\d+) (passed|subtests passed)", done.stdout.splitlines()[-1])
    }
    assert "passed" in counts, done.stdout[-2000:] + done.stderr[-2000:]
    return failed, counts["passed"], counts.get("subtests passed", 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_accelerated_classes_pass_what_the_librarys_pass(library_tests: Path) -> None:
    expected, passed, subtests = outcome(library_tests, "transformers")
    found, ours_passed, ours_subtests = outcome(library_tests, "gptkern.transformers")
    print(
        f"library: {passed} passed, {subtests} subtests; accelerated: {ours_passed} passed, {ours_subtests}"
    )
    assert not found - expected
    assert (ours_passed, ours_subtests) == (passed, subtests)
    assert passed > 70
