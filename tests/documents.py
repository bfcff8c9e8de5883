"""Helpers of the tests of README and docs: code blocks and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import gptkern.cli
from gptkern import GPT

ROOT = Path(__file__).parents[1]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language; no indented blocks (notes, lists) and no whole files."""
    return [code for named, title, code in _fenced(text) if named == language and not title]


def files(text: str) -> dict[str, str]:
    """The fenced blocks that are whole files, by the path that their ``title`` gives."""
    return {title: code for _, title, code in _fenced(text) if title}


def _fenced(text: str) -> list[tuple[str, str, str]]:
    fence = r'^```(\w*)(?: title="([^"]*)")?[^\n]*\n(.*?)^```'
    return re.findall(fence, text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str, language: str) -> Iterator[list[str]]:
    """The arguments of every gptkern command in a page's shell blocks."""
    for block in blocks(text, language):
        for line in block.splitlines():
            for part in re.split(r"\||&&|>", line):
                words = shlex.split(part, comments=True)
                words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
                if words and words[0] == "gptkern":
                    yield words[1:]


def accept(arguments: list[str], folder: Path) -> None:
    """Parse a command as ``gptkern`` does, without running it.

    Args:
        folder: The working directory of the command: the files that it names are created there.
    """
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("tinyshakespeare.txt", "prompt.txt", "held-out.txt", "my.toml", "old.json", "new.json"):
        (folder / name).write_text("{}")
    (folder / "run").mkdir()
    app = typer.main.get_command(gptkern.cli.build())
    called: list[str] = []
    at_once: set[str] = set()  # options that print something and end the command
    for path, command in _leaves(app):
        command.callback = lambda path=path, **options: called.append(path)
        at_once |= {name for option in command.params if option.is_eager for name in option.opts}
    app(args=arguments, prog_name="gptkern", standalone_mode=False)
    if at_once & set(arguments):
        return
    assert len(called) == 1
    assert " ".join(arguments).startswith(called[0])


def _leaves(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that has no commands below it, with its name in full."""
    if not hasattr(command, "commands"):
        yield path.strip(), command
    for name, below in getattr(command, "commands", {}).items():
        yield from _leaves(below, f"{path} {name}")


def embedded_for_gpt2(name: str | Path = "embedded", _load: Any = GPT.from_pretrained, **options: Any) -> GPT:
    """``GPT.from_pretrained`` in which the embedded model stands in for the one on the hub."""
    model: GPT = _load("embedded" if name == "gpt2" else name, **options)
    return model


def links(text: str) -> Iterator[str]:
    """The targets of a page's Markdown links, those in code left out."""
    plain = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if not target.startswith(("http://", "https://", "mailto:")):
            yield target


def anchors(text: str) -> set[str]:
    """The names by which a page's headings are linked to."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """A page's links to files and headings that are not there."""
    wrong = []
    for target in links(page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            wrong.append(target)
    return wrong
