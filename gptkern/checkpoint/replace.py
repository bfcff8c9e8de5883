"""Replacing several files of a folder in one step: all of them or none, wherever the process is killed.

The new files are written into a staging folder inside the folder itself, flushed to disk, and the staging
folder is then renamed to ``.gptkern-pending``. That one rename is the save: before it the old files are
whole, after it the new ones are, and moving them to their places is only tidying up. Whoever opens the
folder next finishes a tidying up that was cut off (``whole``), the next save clears staging folders.

Why not build a second folder and swap the two (renameat2 with RENAME_EXCHANGE)? It would need every other
file of the folder linked over, write permission on the parent, one file system for both and no mount
point in between; and a shell or trainer that stands in the folder would stand in the deleted one after.
Readers other than gptkern see, while the files are being moved (renames alone, no writing), some files
of the old model and some of the new.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from gptkern.checkpoint.errors import CheckpointError

_STAGING = ".gptkern-staging-"
_PENDING = ".gptkern-pending"
_MANIFEST = ".manifest.json"


@contextlib.contextmanager
def replacing(folder: Path, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty folder for the new files; leaving the block puts them into ``folder``.

    Args:
        folder: Made if it is not there. Its other files stay.
        is_ours: Says of a file's name whether it belongs to what is replaced: it goes if there is no new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(folder)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        with _locked(staging):
            yield staging
            new = {path.name for path in staging.iterdir()}
            for name in new:
                _flush(staging / name)
            with _locked(folder):
                _finish(folder)
                stale = [
                    path.name for path in folder.iterdir() if is_ours(path.name) and path.name not in new
                ]
                (staging / _MANIFEST).write_text(json.dumps(stale))
                _flush(staging / _MANIFEST)
                _flush(staging)
                os.rename(staging, folder / _PENDING)
                _flush(folder)
                _finish(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[None]:
    """Within the block no save moves files of ``folder``; one that was cut off is finished first."""
    if (folder / _PENDING).exists():
        try:
            with _locked(folder):
                _finish(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: a save was cut off when complete, in {_PENDING}, and finishing it failed: {error}"
            ) from error
    with _locked(folder, shared=True):
        yield


def _finish(folder: Path) -> None:
    """Move what is pending to its places; what was moved before the cut is not there any more."""
    pending = folder / _PENDING
    if not pending.exists():
        return
    manifest = pending / _MANIFEST
    for path in sorted(pending.iterdir()):
        if path != manifest:
            os.replace(path, folder / path.name)
    if manifest.exists():
        for name in json.loads(manifest.read_text()):
            (folder / name).unlink(missing_ok=True)
        _flush(folder)
        manifest.unlink()
    pending.rmdir()
    _flush(folder)


def _clear_abandoned(folder: Path) -> None:
    """Remove staging folders that no living process holds."""
    for path in folder.glob(_STAGING + "*"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(path, wait=False):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock, which the system drops when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(descriptor, kind)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems have no locks: there one process must save at a time
            pass
        yield
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
