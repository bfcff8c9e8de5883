"""What mkdocs runs while it builds the pages: references that are made from what they describe.

A page says by a comment where one goes; ``MARKS`` lists them. Nothing of it is committed, so it is never old.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_type_hints

import typer.main

import gptkern.cli

_HIDDEN = ("help", "install_completion", "show_completion")
_KINDS = {
    "str": "TEXT",
    "int": "N",
    "float": "X",
    "path": "PATH",
    "file": "FILE",
    "list[str]": "TEXT",
    "list[int]": "N",
}
_KINDS["list[Path]"] = "PATH"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page's Markdown with the references in the places of their marks."""
    for mark, make in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """A page without the marks by which docstrings announce their code, as plain text needs them."""
    return html.replace("<p>::</p>", "").replace("::</p>", ":</p>")


def commands() -> str:
    """Every command: its text, its arguments and its options, as Markdown."""
    app: Any = typer.main.get_command(gptkern.cli.build())
    return "\n\n".join(_command(name, command) for name, command in app.commands.items())


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    parts = [f"## gptkern {name}", _text(command.help or "")]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in _HIDDEN]
    if arguments:
        parts.append(_table(context, "argument", arguments))
    for title, group in _panels(options).items():
        parts.append(f"**{title}**")
        parts.append(_table(context, "option", group))
    return "\n\n".join(parts)


def _panels(options: list[Any]) -> dict[str, list[Any]]:
    """Options under the titles that ``--help`` gives them."""
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    return panels


def _text(help_: str) -> str:
    """A docstring as Markdown: what follows typer's form feed is not for readers; lists get a blank line."""
    lines: list[str] = []
    for line in help_.partition("\f")[0].strip().splitlines():
        if (
            line.startswith(("- ", "* "))
            and lines
            and lines[-1].strip()
            and not lines[-1].startswith(("- ", "* ", " "))
        ):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _table(context: Any, kind: str, parameters: list[Any]) -> str:
    return "\n".join([f"| {kind} | meaning |", "|---|---|", *(_row(context, p) for p in parameters)])


def _row(context: Any, parameter: Any) -> str:
    meaning = " ".join(_words(parameter)).replace("|", "\\|")
    return f"| {_names(context, parameter)} | {meaning} |"


def _names(context: Any, parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name}`"
    spelled = [*reversed(parameter.opts), *parameter.secondary_opts]
    value = "" if parameter.is_flag else f" {_value(context, parameter)}"
    return ", ".join(f"`{name}{value if name.startswith('--') else ''}`" for name in spelled)


def _value(context: Any, parameter: Any) -> str:
    """What stands for the value: its metavar, its choices, or its type in capitals."""
    kind: str = parameter.metavar or parameter.display_type(context).strip("<>")
    return _KINDS.get(kind.partition(" ")[0], kind)


def _words(parameter: Any) -> Iterator[str]:
    if parameter.help:
        yield parameter.help
    if parameter.required:
        yield "Required."
    default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    shown = getattr(default, "value", default)
    if parameter.show_default and not callable(shown) and shown not in (None, False, True, "", [], ()):
        yield f"Default: {shown}."


def generation_options() -> str:
    """Every option of ``generate``, from the table that its checks are made from, as Markdown."""
    from gptkern.engine.options import OPTIONS

    rows = ["| option | meaning |", "|---|---|"]
    for option in OPTIONS.values():
        parts = [f"{option.help} {option.more}".strip().replace("``", "`")]
        parts += [f"Accepted: {option.range.words}."] if option.range else []
        parts += [f"Default: `{option.default!r}`."] if option.default is not None else []
        parts += [f"In the shell: `{option.flag.names[0]}`."] if option.flag else []
        rows.append(f"| `{option.name}` | {' '.join(parts)} |")
    return "\n".join(rows)


def training_keys() -> str:
    """Every table and key of a training file, from the dataclasses that read it, as Markdown."""
    from gptkern.config import GPTConfig
    from gptkern.train.settings import Settings

    sections = {name: kind for name, kind in get_type_hints(Settings).items() if name != "model"}
    return "\n\n".join(_keys(name, section) for name, section in {"model": GPTConfig, **sections}.items())


def _keys(name: str, section: Any) -> str:
    from gptkern.train.reference import _meanings

    meanings, defaults = _meanings(section), section()
    rows = []
    for field in dataclasses.fields(section):
        meaning = " ".join(meanings[field.name].replace("``", "`").split())
        rows.append(f"| `{field.name}` | `{_toml(getattr(defaults, field.name))}` | {meaning} |")
    return "\n".join([f"### [{name}]", "", "| key | default | meaning |", "|---|---|---|", *rows])


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"'.replace("\n", "\\n") if isinstance(value, str) else str(value)


def request_fields() -> str:
    """Every field of a request to the server, from the models that check it, as Markdown."""
    from gptkern.serve.protocol import ChatRequest, CompletionRequest, GenerationFields

    def table(fields: Any) -> str:
        rows = (f"| `{name}` | {field.description} |" for name, field in fields)
        return "\n".join(["| field | meaning |", "|---|---|", *rows])

    shared = GenerationFields.model_fields
    parts = [table(shared.items())]
    for title, kind in (("completions", CompletionRequest), ("chat completions", ChatRequest)):
        own = [(name, field) for name, field in kind.model_fields.items() if name not in shared]
        parts += [f"Of {title} alone:", table(own)]
    return "\n\n".join(parts)


MARKS = {
    "<!-- every field of a request: scripts/docs_hooks.py -->": request_fields,
    "<!-- every option of generate: scripts/docs_hooks.py -->": generation_options,
    "<!-- every command and its options: scripts/docs_hooks.py -->": commands,
    "<!-- every key of a training file: scripts/docs_hooks.py -->": training_keys,
}
