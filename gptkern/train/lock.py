"""One training run in a folder at a time: a lock file that says who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from gptkern.train.errors import SettingsError

_NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder``'s lock within the block. The system drops it when the process ends, however it does.

    Raises:
        SettingsError: Another run holds it; the message names its process, machine and beginning.
    """
    # Not through a link: what the lock file holds is overwritten.
    descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"{folder}: {_holder(descriptor)} trains into this folder: let it end, or give another --out"
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _this_process() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(holder['pid'])} on {str(holder['host'])!r}, since {str(holder['since'])!r},"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
