"""The error of settings with which a run cannot start, and the check of their names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SettingsError(ValueError):
    """A run cannot start with these settings."""


def check_names(where: str, names: Iterable[str], known: set[str], kind: str = "a setting") -> None:
    """Refuse a name that is not known, with the one that may be meant.

    Raises:
        SettingsError: The message begins with ``where`` and the name, and says that it is not ``kind``.
    """
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
            raise SettingsError(f"{where}{name} is not {kind}; {hint}")
