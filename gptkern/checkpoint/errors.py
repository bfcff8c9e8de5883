"""The one error of everything that reads or writes checkpoints, and how it shows what was found."""

from __future__ import annotations

import reprlib

_LONGEST_MESSAGE = 2000

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 80


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written.

    The message names the file, the tensor where there is one, what was expected and what was found. Names
    come from files that anybody may have written: a long message is cut in its middle, and characters that
    steer a terminal or cannot be encoded are shown by their escapes.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__("".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in message))


def some(names: list[str], shown: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def shown(value: object) -> str:
    """A value that a file holds, as short text, however large, deep or strange it is."""
    try:
        return _shorten.repr(value)
    # an integer beyond what Python writes in decimals, nesting beyond its stack
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
