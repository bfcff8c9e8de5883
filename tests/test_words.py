"""Docstrings say their subject first: none begins with a word that leaves the reader to guess it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gptkern"
FOLDERS = ("bench", "checkpoint", "cli", "tokenizer", "train")
RETIRED = re.compile(r"(Of|What|Whether|Which|Why|The same|Everything|Their|It|From|Where|How)\b")


def retired(source: str) -> list[str]:
    """The first lines of docstrings that begin with a retired word."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if RETIRED.match(text):
                found.append(text.splitlines()[0])
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_their_subject(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    found = [f"{path.name}: {line}" for path in files for line in retired(path.read_text())]
    assert found == []


def test_the_test_finds_them() -> None:
    assert retired('"""Scales."""\ndef f():\n    """What is left."""') == ["What is left."]
