"""What holds for the whole process: strict mode, and that nothing falls back in silence."""

from __future__ import annotations

import os

from gptkern._warn import warn

_told: set[tuple[str, str]] = set()


class FallbackWarning(UserWarning):
    """Something runs on slower code although faster code exists for it."""


def strict() -> bool:
    """Whether ``GPTKERN_STRICT=1`` makes an error of every fallback."""
    return os.environ.get("GPTKERN_STRICT", "0") == "1"


def fallback(part: str, instead: str, reason: str) -> None:
    """Say, once a process, that ``part`` runs on ``instead``, and why.

    Raises:
        RuntimeError: ``GPTKERN_STRICT=1`` is set.
    """
    message = f"gptkern: {part} runs on {instead}: {reason}"
    if strict():
        raise RuntimeError(f"{message} (GPTKERN_STRICT=1 makes this an error)")
    if (part, reason) not in _told:
        _told.add((part, reason))
        warn(message, FallbackWarning)
