"""The README tells the truth: its snippets run, its commands parse, its names and files are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import gptkern
import gptkern.cli
import gptkern.ops
from gptkern.generate import GenerateOptions
from gptkern.gpt import GPT

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if not language for line in code.splitlines()]
WIDTH = 64


def tensors() -> dict[str, torch.Tensor]:
    """What a reader has already: the tensors that the kernels' snippet only names."""
    x = torch.randn(2, 8, WIDTH)
    return {
        **{name: torch.randn(2, 8, 4, 16) for name in "qkv"},
        "x": x,
        "residual": torch.randn_like(x),
        "weight": torch.ones(WIDTH),
        "bias": torch.zeros(WIDTH),
        "w_fc": torch.randn(4 * WIDTH, WIDTH),
        "b_fc": torch.zeros(4 * WIDTH),
        "w_proj": torch.randn(WIDTH, 4 * WIDTH),
        "b_proj": torch.zeros(WIDTH),
    }


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model stands in for the one on the hub."""
    load = GPT.from_pretrained

    def local(name: str = "embedded", **options: Any) -> GPT:
        assert name in ("gpt2", "embedded"), f"{name}: nothing stands in for it"
        return load("embedded", **options)

    monkeypatch.setattr(GPT, "from_pretrained", local)


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


def commands() -> Iterator[list[str]]:
    """The arguments of every gptkern command in the text."""
    for line in SHELL:
        for part in re.split(r"\||&&", line):
            words = shlex.split(part, comments=True)
            if words and words[0] == "gptkern":
                yield words[1:]


def leaves(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that has no commands below it, with its name in full."""
    if not hasattr(command, "commands"):
        yield path.strip(), command
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, f"{path} {name}")


@pytest.mark.parametrize("arguments", list(commands()), ids=" ".join)
def test_commands_are_accepted(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("tinyshakespeare.txt", "old.json", "new.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    app = typer.main.get_command(gptkern.cli.build())
    called: list[str] = []
    for path, command in leaves(app):
        command.callback = lambda path=path, **options: called.append(path)
    app(args=arguments, prog_name="gptkern", standalone_mode=False)
    assert len(called) == 1
    assert " ".join(arguments).startswith(called[0])


def test_commands_are_found() -> None:
    assert len(list(commands())) >= 10


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
