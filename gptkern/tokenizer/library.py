"""Calls of the ``tokenizers`` library, whose errors all become one kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gptkern.checkpoint.errors import CheckpointError, first_line


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Within the block whatever the library raises becomes a CheckpointError that begins with ``what``."""
    try:
        yield
    # it raises bare Exception
    except Exception as error:
        raise CheckpointError(f"{what}: {first_line(error)}") from error
    except BaseException as error:
        # a panic in its Rust code is a BaseException, of a class that it does not export
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: the tokenizers library failed: {first_line(error)}") from None
