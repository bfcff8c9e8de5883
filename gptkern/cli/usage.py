"""Messages for a command line that makes no sense: the value that came, what is accepted, an example."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer

# typer carries a copy of click in newer versions, which has no public name.
UsageProblem: Any = typer.BadParameter.__mro__[2]

_BOUNDS = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "{} or less"),
    "less_than": ("lt", "less than {}"),
}
_KINDS = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
}


def in_flags(message: str) -> str:
    """A message of ``generate`` with the command line's names of its options."""
    if not message.startswith("generate: "):
        return message
    from gptkern.engine.options import TABLE

    message = message.replace("do_sample=True", "sampling, which --greedy and --num-beams turn off")
    message = message.replace("do_sample=False", "--greedy")
    names = {option.name: option.flag.names[0] for option in TABLE if option.flag is not None}
    return re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[1]], message)


def usage_message(error: Any, command: str | None) -> str:
    """One line: what is wrong, where there is one an example, and which help tells more.

    Args:
        error: What typer raised.
        command: The command that was called; None where there is none of that name.
    """
    example = _example(command) if error.__class__.__name__ == "MissingParameter" else None
    hint = f", as in: {example}" if example else ""
    help_ = " ".join(filter(None, ("gptkern", command, "--help")))
    return f"{_with_value(error).removesuffix('.')}{hint} ({help_} tells more)"


def _with_value(error: Any) -> str:
    """typer's message. Where pydantic parsed the value, it does not say which: it is put in."""
    message: str = error.format_message()
    details: Callable[[], list[dict[str, Any]]] = getattr(error.__cause__, "errors", list)
    if not (found := details()):
        return message
    value, kind, context = found[0].get("input"), found[0].get("type", ""), found[0].get("ctx", {})
    place = message.partition(":")[0]
    if kind in _KINDS:
        return f"{place}: {value!r} is not {_KINDS[kind]}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{place}: {value} given; {words.format(context.get(name))} is needed"
    if kind == "value_error" and "error" in context:
        return f"{place}: {context['error']}"
    return f"{message} ({value!r} given)"


def _example(command: str | None) -> str | None:
    """The first example in a command's help."""
    if command is None:
        return None
    help_ = getattr(import_module(f"gptkern.cli.{command}"), command).__doc__ or ""
    found = re.search(rf"`(gptkern {command}\b[^`]*)`", help_)
    return " ".join(found[1].split()) if found else None
