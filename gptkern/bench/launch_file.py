"""Launch tables as files: what the tuner reads and writes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from gptkern.durable import write_file

Table = dict[str, list[dict[str, Any]]]


def text(table: Table, header: str) -> str:
    """The table as ``gptkern/ops/tables/`` holds it: ``header``, then a block a row."""
    blocks = [
        "\n".join([f"[[{kernel}]]", *(f"{name} = {_value(value)}" for name, value in row.items())])
        for kernel, rows in table.items()
        for row in rows
    ]
    return "\n\n".join([header, *blocks]) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def read(path: Path) -> tuple[Table, str]:
    """(the table, the comment it begins with).

    Raises:
        ValueError: No such table is there.
    """
    try:
        content = path.read_text()
        table: Table = tomllib.loads(content)
    except (OSError, ValueError) as failure:
        raise ValueError(f"{path}: not a launch table: {failure}") from failure
    return table, content.partition("\n\n")[0]


def write(table: Table, header: str, path: Path) -> None:
    """Write the table whole or not at all."""
    write_file(path, text(table, header))
