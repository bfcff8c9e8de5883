"""Strict mode and fallback warnings of the process: nothing falls back in silence."""

from __future__ import annotations

import os

from gptkern._warn import warn

_past_warnings: set[tuple[str, str]] = set()


class FallbackWarning(UserWarning):
    """Something runs on slower code although faster code exists for it."""


def strict() -> bool:
    """True if ``GPTKERN_STRICT=1`` makes an error of every fallback, and of a kernel that no pack has."""
    return os.environ.get("GPTKERN_STRICT", "0") == "1"


def fallback(part: str, substitute: str, reason: str) -> None:
    """Warn, once in a process, that ``part`` runs on ``substitute``, and why.

    Raises:
        RuntimeError: ``GPTKERN_STRICT=1`` is set.
    """
    message = f"gptkern: {part} runs on {substitute}: {reason}"
    if strict():
        raise RuntimeError(f"{message} (GPTKERN_STRICT=1 makes this an error)")
    if (part, reason) not in _past_warnings:
        _past_warnings.add((part, reason))
        warn(message, FallbackWarning)
