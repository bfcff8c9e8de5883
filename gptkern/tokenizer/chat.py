"""Chat templates: messages become the text that a model was trained to answer.

A template is a program in jinja2's language, and comes with the model's files. It runs in jinja2's immutable
sandbox, with the switches and helpers that transformers gives it, and only when a conversation is rendered.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gptkern.checkpoint.errors import CheckpointError, first_line, shown

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]

DEFAULT, TOOL_USE = "default", "tool_use"
_MARK = "END_OF_THE_MESSAGE_TO_CONTINUE"


def named_templates(where: str, value: object) -> dict[str, str]:
    """The templates that ``chat_template`` of a ``tokenizer_config.json`` holds, by their names.

    Args:
        where: What the message of an error begins with.
        value: Text, a list of objects with ``name`` and ``template``, an object, or None.

    Raises:
        CheckpointError: It is something else.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        entries = [(entry.get("name"), entry.get("template")) for entry in value]
    if not entries or not all(isinstance(part, str) for entry in entries for part in entry):
        raise CheckpointError(
            f"{where}: chat_template is {shown(value)}; text, or a list of objects with name and template, "
            "is needed"
        )
    return dict(entries)


def chosen_template(templates: Mapping[str, str], choice: str | None, tools: object) -> str:
    """The template that is asked for, by its name or its own text; else the one for tools, else the default.

    Raises:
        ValueError: There is none.
    """
    if choice is not None:
        return templates.get(choice, choice)
    names = (TOOL_USE, DEFAULT) if tools is not None else (DEFAULT,)
    found = next((templates[name] for name in names if name in templates), None)
    if found is None:
        had = f"its templates are {', '.join(sorted(templates))}" if templates else "it has none"
        raise ValueError(
            f"apply_chat_template: the tokenizer has no chat template of its own choice ({had}): pass "
            "chat_template, a template's text or name"
        )
    return found


def render(
    template: str,
    messages: Sequence[Message],
    *,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The text of one conversation.

    Args:
        template: The template's text.
        messages: Objects with ``role`` and mostly ``content``, the oldest first. Those whose value is None
            are left out.
        continue_final_message: End where the last message's content ends, so that the model goes on with it.
        **variables: What the template sees beside ``messages``.

    Raises:
        TypeError: ``messages`` is no sequence of mappings.
        ValueError: No message, a template that cannot be compiled, one that fails or refuses the messages;
            the error names the template's line and shows it.
    """
    plain = _plain_messages(messages)
    if continue_final_message:
        content = plain[-1].get("content")
        if not isinstance(content, str):
            raise ValueError(
                f"apply_chat_template: content of the last message is {shown(content)}; "
                "continue_final_message needs text to continue"
            )
        plain[-1]["content"] = content + _MARK + " "
    try:
        text = compiled(template).render(messages=plain, **variables)
    # a template may fail in whatever way an expression can
    except Exception as error:
        raise ValueError(f"chat template{_place(template, error)}: {first_line(error)}") from error
    return _up_to_mark(text) if continue_final_message else text


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError(
            f"apply_chat_template: conversation is {shown(messages)}; a list of messages, dictionaries with "
            "role and content, is needed"
        )
    if not messages:
        raise ValueError("apply_chat_template: conversation is empty; at least one message is needed")
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _up_to_mark(text: str) -> str:
    before, mark, after = text.rpartition(_MARK)
    if not mark:
        raise ValueError(
            "apply_chat_template: the template does not write the last message's content: it cannot be "
            "continued"
        )
    # A template that trims messages takes the space after the mark, and would have taken the text's own.
    return before if after.startswith(" ") else before.rstrip()


def _place(template: str, error: Exception) -> str:
    """The line of the template that an error comes from, as ``, line 3 (the line)``."""
    number = getattr(error, "lineno", None)
    if number is None:
        frames = traceback.extract_tb(error.__traceback__)
        number = next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None)
    lines = template.split("\n")
    if number is None or not 0 < number <= len(lines):
        return ""
    return f", line {number} ({shown(lines[number - 1].strip())})"


@lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """A template, compiled with the switches and helpers that transformers gives templates."""
    # imported here: a tokenizer alone needs no templates
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """``{% generation %}``: marks a model's own words for training; rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own form

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which models have not seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
