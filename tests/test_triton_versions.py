"""Triton 3.6 and 3.9 compile the package's kernels; the table of what differs between versions."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gptkern.bench.inspect import load

ROOT = Path(__file__).resolve().parents[1]


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("versions", ROOT / "benchmarks" / "triton_versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


versions = _module()


def test_the_page_names_what_decides_about_speed() -> None:
    base = [report for report in load(ROOT / "benchmarks" / "machine_code.json")[0] if report.arch == 90][:3]
    spilling = dataclasses.replace(base[0], local_bytes=base[0].local_bytes + 8)
    larger = dataclasses.replace(base[1], code_bytes=2 * base[1].code_bytes)
    name = versions.triton.__version__
    text = versions.page({name: base, "0.1": [spilling, larger, base[2]]}, [90])
    assert f"## {name} to 0.1\n\n- {base[0].kernel}, " in text
    assert f"local bytes {base[0].local_bytes} -> {spilling.local_bytes}" in text
    assert text.count("\n- ") == 1, "registers and size alone are counted, not listed"
    assert f"| 1.000 | {2 ** (1 / 3):.3f} |" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_a_version_compiles(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is fetched where ``build/triton`` lacks it: two hundred megabytes, so CI leaves this out."""
    if not (versions.FOLDER / version).is_dir():
        monkeypatch.setattr(versions, "FOLDER", tmp_path)
    try:
        versions.installed(version)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"triton {version} cannot be fetched: {error}")
    monkeypatch.setattr(versions, "saved", lambda *asked: tmp_path / "saved.json")
    ops = ["decode_embed", "rms_norm", "flash_attention", "linear", "gated_mlp", "linear_cross_entropy"]
    found = {(report.op, report.kernel) for report in versions.reports(version, [90], ops, "kernel")}
    assert {("decode_embed", "decode_embed_kernel"), ("rms_norm", "norm_forward_kernel")} <= found
    assert {("linear", "linear_hopper"), ("gated_mlp", "linear_hopper")} <= found
    assert {("linear", "linear_dw_hopper"), ("gated_mlp", "linear_dact_hopper")} <= found
    assert ("flash_attention", "flash_attention_forward_hopper") in found
    for kernel in ("logits_hopper", "dhidden_hopper", "dweight_hopper"):
        assert ("linear_cross_entropy", kernel) in found
    assert ("flash_attention", "flash_attention_backward_hopper") in found
    assert sys.modules["triton"].__version__ != version
