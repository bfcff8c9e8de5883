"""transformers' own tests of models, run on the library's classes and on the same classes accelerated.

They come from the library's source distribution: the file that ``GPTKERN_TRANSFORMERS_SDIST`` names, or else
fetched when the test runs. It has the tests that all models share and not those of ``generate``; of two
mixins that they import, empty classes stand in. ``pytest -s -m slow`` shows the counts of each family.
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
# As in tests/transformers_model_tests.py.
FAMILIES = (
    *("gpt2", "llama", "smollm3", "mistral", "qwen2", "qwen3", "phi3"),
    *("granite", "olmo2", "gemma3", "gpt_neox", "gptj", "opt", "gpt_bigcode", "starcoder2"),
)
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
    commands = [["install", "--no-deps", "--target", str(folder / "site"), "parameterized"]]
    given = os.environ.get("GPTKERN_TRANSFORMERS_SDIST")
    if given is None:
        only_source = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        commands.append(["download", *only_source, "-d", str(folder), wanted])
    for arguments in commands:
        done = subprocess.run([*PIP, *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the registry gave no {arguments[-1]}: {done.stderr.strip()[-200:]}")
    archive = next(folder.glob("transformers-*.tar.gz")) if given is None else Path(given)
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


def outcome(folder: Path, family: str, accelerated: bool) -> tuple[set[str], dict[str, int]]:
    """(what failed, tests passed, failed and skipped) with a family's classes."""
    paths = [str(HERE.parent), str(folder.parent / "site"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "GPTKERN_FAMILY": family,
        "GPTKERN_ACCELERATED": str(int(accelerated)),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", ".", "tests/test_gptkern.py"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    # Without the reason, which holds numbers and class paths.
    failed = {
        line.split(" - ")[0] for line in done.stdout.splitlines() if re.match(r"(SUB)?FAILED|ERROR", line)
    }
    last = done.stdout.splitlines()[-1]
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|subtests passed)", last)}
    assert "passed" in counts, done.stdout[-2000:] + done.stderr[-2000:]
    return failed, counts


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_accelerated_models_pass_what_the_librarys_pass(family: str, library_tests: Path) -> None:
    expected, theirs = outcome(library_tests, family, accelerated=False)
    found, ours = outcome(library_tests, family, accelerated=True)
    print(f"{family}: library {theirs}, accelerated {ours}, failed in both: {sorted(expected & found)}")
    assert not found - expected
    assert ours == theirs
    assert ours["passed"] > 100
