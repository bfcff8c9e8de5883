"""The comparison with peers on a CPU, with peers that stand in: what is asked, what is missing, the table."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"

STAND_IN = """
import sys
sys.path.insert(0, {folder!r})
from worker import Missing, serve

def make(folder, form, threads):
    assert (folder / "hf" / "model.safetensors").exists() and (folder / "fp32.gguf").exists()
    if form == "int4":
        raise Missing("no four bits here")
    if form == "int8":
        raise RuntimeError("broken")
    print("noise that a library makes")
    asked = set()

    def generate(ids, new):
        assert str(ids) not in asked, "a prompt that was there before"
        asked.add(str(ids))
        return [[0] * (new + (form == "bf16")) for _ in ids]

    return generate

serve(make, "torch")
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_cpu_peers")


def test_peers_are_measured_and_the_missing_are_said(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN.format(folder=str(FOLDER / "cpu_peers")))
    stand_in = script.Peer("stand-in", sys.executable, path)
    absent = script.Peer("absent", str(tmp_path / "python"), path)
    formats = ["fp32", "bf16", "int8", "int4"]
    found = script.run([stand_in, absent], tmp_path / "models", formats, quick=True, rounds=1, threads=1)
    rows = {(row["peer"], row["format"]): row for row in found["rows"]}
    assert set(rows["stand-in", "fp32"]["cases"]) == {"b2", "first of 16"}
    assert rows["stand-in", "fp32"]["cases"]["first of 16"]["ms"] > 0
    assert "torch" in rows["stand-in", "fp32"]["versions"]
    assert rows["stand-in", "bf16"]["missing"].startswith("it answered with another number of tokens")
    assert rows["stand-in", "int8"]["missing"] == "RuntimeError: broken"
    assert rows["stand-in", "int4"]["missing"] == "no four bits here"
    assert {rows["absent", form]["missing"] for form in formats} == {"its environment is not there"}
    text = script.table(found)
    assert "| stand-in | " in text
    assert "Without int4: stand-in: no four bits here; absent: its environment is not there." in text


def test_shares_are_of_the_fewest_bytes_and_operations(script: ModuleType) -> None:
    ceilings = script.Ceilings(reads=1e9, products={"fp32": 1e9, "bf16": 2e9})
    config = script.QUICK
    inner, head = 12 * 2 * 256 * 256, 1000 * 256
    case = script.Case(1, 16)
    assert ceilings.shares(config, "bf16", case, 1.0) == (
        pytest.approx((inner + head) * 2 / 1e9),
        pytest.approx(2 * (16 * inner + head) / 2e9),
    )
    after = script.Case(3, 32, 5)
    cache = 2 * 3 * 32 * 2 * 256 * 2
    assert ceilings.shares(config, "fp32", after, 2.0) == (
        pytest.approx(((inner + head) * 4 + cache) / 2e9),
        pytest.approx(2 * 3 * (inner + head) / 2e9),
    )


def test_the_table_compares_with_the_best_peer(script: ModuleType) -> None:
    def case(ms: float) -> dict[str, dict[str, float]]:
        return {"b1": {"ms": ms, "of_reads": 0.5, "of_products": 0.25}}

    # The drop-in is no peer: its time would count as the best.
    there = {"gptkern": case(2.0), "transformers, accelerated": case(1.0), "a": case(5.0), "b": case(3.0)}
    lines = script._format_table(there)
    assert "| a | 5.0 (50%, 25%) |" in lines
    assert lines[-1].endswith("| **1.50** |")


def test_a_time_that_noise_swallowed_is_no_time(script: ModuleType) -> None:
    worker = script.Worker(script.Peer("a", sys.executable, FOLDER), "fp32")
    case = script.Case(1, 16, 5)
    worker.seconds = {(1, 16, 1): 2.0, (1, 16, 5): 4.0}
    assert worker.time(case) == 0.5
    worker.seconds[1, 16, 5] = 1.9
    assert worker.time(case) is None
    there = {"gptkern": {"b1": {"ms": 2.0, "of_reads": 0.5, "of_products": 0.25}}, "a": {"b1": None}}
    assert script._format_table(there)[-2:] == [
        "| a | – |",
        "| **the best peer's time / gptkern's** | **–** |",
    ]
