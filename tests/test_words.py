"""Docstrings say their subject first, and names are nouns: the words that DESIGN retired stay away."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gptkern"
FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py")))
PARTS = [*FOLDERS, "."]
# The names of the engine are not covered yet.
NAMED = [part for part in PARTS if part != "engine"]
FIRST = re.compile(r"(Of|What|Whether|Which|Why|The same|Everything|Their|It|From|Where|How)\b")
# Participles and words of several meanings, as names of functions, classes, attributes and parameters.
NAMES = re.compile(
    r"_?(\w+_)?(turned|judged|kept|told|asked|found|given|wanted|said|pays)(_\w+)?|"
    r"_?held|sm_scale|stepper"
)


def files(part: str) -> list[Path]:
    """The modules of one part of the package; of "." those that lie in no folder."""
    return sorted((PACKAGE / part).glob("*.py") if part == "." else (PACKAGE / part).rglob("*.py"))


def retired_sentences(source: str) -> list[str]:
    """The first lines of docstrings that begin with a retired word."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if FIRST.match(text):
                lines.append(text.splitlines()[0])
    return lines


def names(source: str) -> Iterator[str]:
    """The names of functions, classes, attributes and parameters."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            fields = (line.target for line in node.body if isinstance(line, ast.AnnAssign))
            yield from (field.id for field in fields if isinstance(field, ast.Name))
        if isinstance(node, ast.arg):
            yield node.arg
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


@pytest.mark.parametrize("part", PARTS)
def test_docstrings_begin_with_their_subject(part: str) -> None:
    assert files(part)
    lines = [f"{path.name}: {line}" for path in files(part) for line in retired_sentences(path.read_text())]
    assert lines == []


@pytest.mark.parametrize("part", NAMED)
def test_names_are_nouns(part: str) -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in files(part)
        for name in names(path.read_text())
        if NAMES.fullmatch(name)
    }
    assert found == set()


def test_the_tests_find_them() -> None:
    source = '"""Scales."""\ndef f(kept):\n    """What is left."""\n    self.mask_given = local_kept = kept'
    assert retired_sentences(source) == ["What is left."]
    assert [name for name in names(source) if NAMES.fullmatch(name)] == ["kept", "mask_given"]
