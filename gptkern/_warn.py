"""Warnings that point at the user's line, however deep in the package they are found."""

from __future__ import annotations

import sys
import warnings

# The user's line is outside the package, and outside what calls it or stands between: torch's decorators,
# transformers' generate, the import machinery.
_BETWEEN = frozenset({"gptkern", "torch", "transformers", "importlib", "contextlib"})


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of ``message`` at the innermost line of the stack that is the user's; the outermost if none is."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _BETWEEN:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
