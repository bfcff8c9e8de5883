"""Never silent: a fallback warns once, and is an error under ``GPTKERN_STRICT=1``."""

from __future__ import annotations

import os
import warnings

_told: set[tuple[str, str]] = set()


class FallbackWarning(UserWarning):
    """Something runs on transformers' own code although the model is accelerated."""


def fallback(part: str, reason: str) -> None:
    """Say, once a process, that ``part`` takes the library's way, and why.

    Raises:
        RuntimeError: ``GPTKERN_STRICT=1`` is set.
    """
    message = f"gptkern: {part} runs on transformers' own code: {reason}"
    if os.environ.get("GPTKERN_STRICT", "0") == "1":
        raise RuntimeError(f"{message} (GPTKERN_STRICT=1 makes this an error)")
    if (part, reason) not in _told:
        _told.add((part, reason))
        warnings.warn(message, FallbackWarning, stacklevel=3)
