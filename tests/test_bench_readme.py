"""README's performance section says what the committed results say, and nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from test_bench import WHERE, _noisy

from gptkern.bench import results

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _kept(folder: Path, device_type: str) -> None:
    run = _noisy(1)
    run.environment = {**WHERE, "device": f"some {device_type}", "device_type": device_type}
    (folder / device_type).mkdir()
    results.save(run, folder / device_type / "results.json")


def test_readme_is_what_the_results_make_it(readme: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0
    assert readme.main(["--other"]) == 2


def test_a_number_of_ones_own_is_found(
    readme: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\n12 times faster\n{readme.END}\nafter\n")
    assert readme.main(["--check"]) == 1
    assert "12 times" in page.read_text()
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "12 times" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md: the performance section stands between"):
        readme.main([])


def test_gpus_come_first_and_their_absence_is_told(readme: ModuleType, tmp_path: Path) -> None:
    _kept(tmp_path, "cpu")
    text = readme.section(tmp_path)
    assert text.startswith("GPU: not yet measured.")
    assert "some cpu, 2 threads, elapsed time, PyTorch 2.11.0, 2026-01-01, commit 0123456789ab" in text
    assert "| layer_norm 2x8 float32 | 991 µs | 10% | eager 1.98 x |" in text
    _kept(tmp_path, "cuda")
    text = readme.section(tmp_path)
    assert text.startswith("Times are medians.") and "not yet measured" not in text
    assert text.index("some cuda") < text.index("some cpu")
