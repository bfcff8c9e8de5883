"""The picture in README: a terminal in which gptkern is used, drawn from what the commands really print.

Standard output alone: what goes to standard error is a speed, and a picture is no benchmark.

    python scripts/readme_picture.py

Run it again where the commands' output has changed, and look at it before you commit it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from html import escape
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "terminal.svg"
COMMANDS = ('gptkern generate "ROMEO:" --echo --seed 4 -n 112', "gptkern doctor")
COLUMNS, SIZE, LINE, MARGIN, BAR = 80, 14, 20, 18, 34
NO_BREAK = "\u00a0"  # runs of plain spaces become one in SVG
FONTS = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
GLYPH = 0.6 * SIZE  # the width of a letter in a monospaced font
COLOURS = {"back": "#1b1f24", "text": "#d6dde4", "command": "#7ee0c6", "edge": "#39424c"}


def recorded() -> list[tuple[str, str]]:
    """(colour, line) of a terminal in which the commands were typed one after another."""
    lines: list[tuple[str, str]] = []
    for command in COMMANDS:
        lines += [("command", f"$ {command}"), *(_printed(command)), ("text", "")]
    return lines[:-1]


def _printed(command: str) -> list[tuple[str, str]]:
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    done = subprocess.run(shlex.split(command), check=True, capture_output=True, text=True, env=environment)
    return [("text", line.rstrip()) for line in done.stdout.strip("\n").splitlines()]


def drawn(lines: list[tuple[str, str]]) -> str:
    """The lines as SVG, in a dark window that suits light and dark pages."""
    width = round(COLUMNS * GLYPH + 2 * MARGIN)
    height = BAR + len(lines) * LINE + MARGIN
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    label = "A terminal: gptkern writes a few lines of a play, then says what it runs on"
    edge = f'fill="{COLOURS["back"]}" stroke="{COLOURS["edge"]}"'
    dots = [f'<circle cx="{MARGIN + 4 + 18 * i}" cy="17" r="5" fill="{COLOURS["edge"]}"/>' for i in range(3)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">',
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="9" {edge}/>',
        *dots,
        f'<g font-family="{FONTS}" font-size="{SIZE}">',
    ]
    for number, (colour, line) in enumerate(lines):
        y = BAR + number * LINE + SIZE
        if line:
            text = escape(line).replace(" ", NO_BREAK)
            parts.append(f'<text x="{MARGIN}" y="{y}" fill="{COLOURS[colour]}">{text}</text>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawn(recorded()), encoding="utf-8")
