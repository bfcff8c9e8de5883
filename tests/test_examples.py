"""The examples that need no training run: each runs as its first lines say, and shows what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT

from gptkern import GPT

EXAMPLES = ROOT / "examples"


def run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_kernels_alone_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    losses = re.findall(r"loss ([\d.]+)", run("kernels_alone.py", monkeypatch, capsys, "--steps", "40"))
    assert len(losses) == 3
    assert float(losses[-1]) < 0.7 * float(losses[0])


def test_batch_scoring_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, *lines = run("batch_scoring.py", monkeypatch, capsys).splitlines()
    assert [line.rsplit("says ", 1)[1] for line in lines] == ["the king.", "the kign.", "xqzj wv."]


def test_quantise_compares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n" * 4)
    printed = run("quantise.py", monkeypatch, capsys, str(text), "--formats", "int8", "--tokens", "100")
    rows = [line.split() for line in printed.splitlines()[1:]]
    assert [row[0] for row in rows] == ["as", "int8"]
    assert float(rows[1][1]) < float(rows[0][3])
    assert abs(float(rows[1][2]) / float(rows[0][4]) - 1) < 0.02


def test_profiling_names_times(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("profiling.py", monkeypatch, capsys, "--tokens", "4")
    assert "decode" in printed
    assert re.search(r"a token reads \d\.\d+ MB", printed)


def test_speculation_saves_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run("speculation.py", monkeypatch, capsys)
    passes, tokens = map(int, re.search(r"(\d+) passes instead of (\d+)", printed).groups())
    assert passes < tokens == 60


def test_the_index_names_every_example() -> None:
    index = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"\[([\w.]+)\]\(", index)) == files


def test_engine_answers_each_as_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = dict(line.split(": ", 1) for line in run("engine.py", monkeypatch, capsys).splitlines())
    assert sorted(printed) == ["0", "1", "2", "3"]
    model = GPT.from_pretrained()
    ids = torch.tensor([model.tokenizer.encode("ROMEO:")])
    alone = model.generate(ids, max_new_tokens=30, do_sample=True, seed=1)
    assert printed["1"] == repr(model.tokenizer.decode(alone[0]))
