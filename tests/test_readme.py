"""The README tells the truth: its snippets run, its commands parse, its names and files are there."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, accept, blocks, broken_links, commands, embedded_for_gpt2

import gptkern
from gptkern.gpt import GPT

TEXT = (ROOT / "README.md").read_text()
SNIPPETS = blocks(TEXT, "python")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model stands in for the one on the hub."""
    monkeypatch.setattr(GPT, "from_pretrained", embedded_for_gpt2)


@pytest.mark.usefixtures("offline")
def test_snippets_run_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SNIPPETS) >= 3
    names: dict[str, Any] = {}
    printed = []
    for code in SNIPPETS:
        exec(compile(code, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(printed[0]) >= 50
    assert printed[1].startswith("Once upon a time")
    assert len(printed[1]) == len("Once upon a time") + 34 + 1
    assert names["out"].shape == (2, 10, 4, 16)
    assert names["y"].shape == (2, 10, 64)


@pytest.mark.parametrize("arguments", list(commands(TEXT, "")), ids=" ".join)
def test_commands_are_accepted(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    accept(arguments, tmp_path)


def test_commands_are_found() -> None:
    assert len(list(commands(TEXT, ""))) >= 10


def test_named_functions_exist() -> None:
    used = set(re.findall(r"\bgptkern\.([A-Za-z_]\w*)\(", TEXT))
    assert len(used) >= 1
    assert [name for name in sorted(used) if not hasattr(gptkern, name)] == []


def test_links_lead_somewhere() -> None:
    assert broken_links(ROOT / "README.md") == []


def test_the_pictures_commands_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture = html.unescape((ROOT / "docs" / "assets" / "terminal.svg").read_text()).replace("\u00a0", " ")
    typed = [shlex.split(line)[1:] for line in re.findall(r">\$ (gptkern .*)</text>", picture)]
    assert [words[0] for words in typed] == ["generate", "doctor"]
    for number, arguments in enumerate(typed):
        (tmp_path / str(number)).mkdir()
        accept(arguments, tmp_path / str(number))


def test_named_files_exist() -> None:
    named = {*re.findall(r"`((?:[\w-]+/)+[\w.]*)`", TEXT), *re.findall(r"`(\w+\.(?:toml|txt|md))`", TEXT)}
    inside = {name: [ROOT / name, ROOT / "gptkern" / name] for name in named}
    assert len(named) >= 3
    assert [name for name, places in inside.items() if not any(p.exists() for p in places)] == []


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_run_by_some_test(example: Path) -> None:
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert any(f'"{example.name}"' in text for text in tests)
