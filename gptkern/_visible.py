"""Text that comes from anywhere, as a terminal may show it."""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

# C0, DEL and C1: a terminal takes them as commands (clipboard, title, clear the screen). Line breaks and
# tabs are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: object, stream: TextIO | Any | None = None) -> str:
    """``text`` with its control characters spelled out where ``stream`` is a terminal.

    Pipes and files get the text as it is. ``stream`` is standard output when None.
    """
    if not (sys.stdout if stream is None else stream).isatty():
        return str(text)
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", str(text))
