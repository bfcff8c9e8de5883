"""The README tells the truth: its snippets run, its commands parse, its names and files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, WIDTH, accept, blocks, commands, embedded_for_gpt2, tensors

import gptkern
import gptkern.ops
from gptkern.generate import GenerateOptions
from gptkern.gpt import GPT

TEXT = (ROOT / "README.md").read_text()
SNIPPETS = blocks(TEXT, "python")
SHELL = [line for code in blocks(TEXT, "") for line in code.splitlines()]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model stands in for the one on the hub."""
    monkeypatch.setattr(GPT, "from_pretrained", embedded_for_gpt2)


@pytest.mark.usefixtures("offline")
def test_snippets_run_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SNIPPETS) >= 3
    names: dict[str, Any] = tensors()
    printed = []
    for code in SNIPPETS:
        exec(compile(code, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(printed[0]) >= 50
    assert printed[1].startswith("Once upon a time")
    assert len(printed[1]) == len("Once upon a time") + 34 + 1
    assert names["out"].shape == (2, 8, 4, 16)
    assert names["y"].shape == (2, 8, WIDTH)


@pytest.mark.parametrize("arguments", list(commands(TEXT, "")), ids=" ".join)
def test_commands_are_accepted(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    accept(arguments, tmp_path)


def test_commands_are_found() -> None:
    assert len(list(commands(TEXT, ""))) >= 10


def rows(after: str) -> list[str]:
    """The rows of the table that follows a line of the text."""
    section = TEXT[TEXT.index(after) :]
    table = re.search(r"^\|---\|---\|\n((?:\|.*\n)+)", section, flags=re.MULTILINE)
    assert table
    return table[1].splitlines()


def test_named_ops_and_methods_exist() -> None:
    ops = [name for row in rows("## The kernels alone") for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(ops) >= 15
    assert [name for name in ops if not callable(getattr(gptkern.ops, name, None))] == []
    methods = [name for row in rows("## Generate") for name in re.findall(r"`model\.(\w+)\(", row)]
    assert len(methods) >= 4
    assert [name for name in methods if not callable(getattr(GPT, name, None))] == []
    used = set(re.findall(r"\bgptkern\.([A-Za-z_]\w*)\(", TEXT))
    assert [name for name in sorted(used) if not hasattr(gptkern, name)] == []


def test_named_options_exist() -> None:
    (row,) = [row for row in rows("## Generate") if row.startswith("| `model.generate(ids, ...)")]
    named = re.findall(r"`(\w+)`", row.split("|")[2])
    accepted = {*GenerateOptions.__annotations__, "streamer", "attention_mask"}
    assert len(named) >= 8
    assert set(named) <= accepted


def test_named_files_exist() -> None:
    named = {*re.findall(r"`((?:\w+/)+[\w.]*)`", TEXT), *re.findall(r"`(\w+\.(?:toml|txt|md))`", TEXT)}
    named |= {word for line in SHELL for word in shlex.split(line, comments=True) if "configs/" in word}
    inside = {name: [ROOT / name, ROOT / "gptkern" / name] for name in named}
    assert len(named) >= 8
    assert [name for name, places in inside.items() if not any(p.exists() for p in places)] == []


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_run_by_some_test(example: Path) -> None:
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert any(f'"{example.name}"' in text for text in tests)
