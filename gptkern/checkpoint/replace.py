"""Replacing several files of a folder at once: all of them or none, wherever the process is killed.

The new files are written into a staging folder inside the folder itself, flushed to disk, and the staging
folder is then renamed to ``.gptkern-pending``. That one rename is the save: before it the old files are
whole, after it the new ones are, and moving them to their places is only tidying up. Killed in between, the
next save finishes that; readers look through what is pending and change nothing (``pending``). The manifest
beside the new files says which contents they replace, so that a pending set is never moved over what another
program saved later: it is set aside, under ``.gptkern-aside-...``, with a warning.

Why not build a second folder and swap the two (renameat2 with RENAME_EXCHANGE)? It would need every other
file of the folder linked over, write permission on the parent, one file system for both and no mount
point in between; and a shell or trainer that stands in the folder would stand in the deleted one after.
Readers other than gptkern see, while the files are being moved (renames alone, no writing), some files
of the old model and some of the new.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gptkern._warn import warn
from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.pending import (
    MANIFEST,
    PENDING,
    Change,
    fits,
    is_plain,
    manifest,
    recognise,
)
from gptkern.durable import PARTIAL, Identity, NewFile, flush, identity, make_folder, naming, new_file

_STAGING = ".gptkern-staging-"
_ASIDE = ".gptkern-aside-"
# seconds until a save that waits for another says so, and until it gives up
_SILENCE, _PATIENCE, _PAUSE = 2.0, 120.0, 0.02


class Staging:
    """The folder that a save writes its new files into.

    Attributes:
        folder: It, for what writes files of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[str, Identity] = {}

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[NewFile]:
        """Write a file of that name, checked and flushed."""
        with new_file(self.folder / name) as file:
            yield file
        self._written[name] = file.identity

    def identities(self) -> dict[str, Identity]:
        """Size and checksum of every file in it, all flushed to the disk."""
        found = {}
        for path in self.folder.iterdir():
            written = self._written.get(path.name)
            if written is None:
                flush(path)
                written = identity(path)
                assert written is not None
            found[path.name] = written
        return found


@contextlib.contextmanager
def replacing(folder: Path, is_ours: Callable[[str], bool]) -> Iterator[Staging]:
    """Yield a place for the new files; leaving the block puts them into ``folder``.

    A file keeps the permissions of the one it replaces.

    Args:
        folder: Made if it is not there. Its other files stay.
        is_ours: Says of a file's name whether it belongs to what is replaced: it goes if there is no new one.

    Raises:
        CheckpointError: A folder or a device is where a file is to be; another save holds the folder.
        OSError: It could not be written: the old files are whole, or the new ones.
    """
    make_folder(folder)
    with contextlib.ExitStack() as staged:
        # within one lock, so that no other save takes the new staging folder for an abandoned one
        with _locked(folder):
            _clear_abandoned(folder)
            with naming(folder):
                path = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
            staged.callback(_remove, path)
            staged.enter_context(_locked(path))
        staging = Staging(path)
        yield staging
        with _locked(folder), naming(folder):
            _finish(folder)
            _commit(folder, staging, is_ours)
            _finish(folder)


def settle(folder: Path) -> None:
    """Finish a save that was cut off there, or set it aside: for those who save there themselves."""
    if os.path.lexists(folder / PENDING):
        with _locked(folder):
            _finish(folder)


def _commit(folder: Path, staging: Staging, is_ours: Callable[[str], bool]) -> None:
    """Make the staged files the folder's: all of them by one rename."""
    new = staging.identities()
    if unknown := {name for name in new if not is_plain(name)}:
        raise ValueError(f"{folder}: {unknown} are no names of a model's files")
    stale = {
        path.name for path in folder.iterdir() if is_ours(path.name) and is_plain(path.name)
    } - new.keys()
    changes = {
        name: Change(new.get(name), _replaced_identity(folder / name)) for name in sorted(new.keys() | stale)
    }
    _keep_permissions(folder, staging.folder, changes)
    with new_file(staging.folder / MANIFEST) as file:
        file.write(manifest(changes).encode())
    flush(staging.folder)
    os.rename(staging.folder, folder / PENDING)
    flush(folder)


def _replaced_identity(path: Path) -> tuple[int, int] | None:
    try:
        return identity(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be replaced: {error}") from error


def _keep_permissions(folder: Path, staging: Path, changes: Mapping[str, Change]) -> None:
    """Give new files the permissions of those they replace; of other names, no more than all of them have."""
    modes = {
        name: stat.S_IMODE((folder / name).stat().st_mode)
        for name, change in changes.items()
        if change.old is not None
    }
    for name, change in changes.items():
        if change.new is not None:
            mode = stat.S_IMODE((staging / name).stat().st_mode)
            for replaced in modes.values():
                mode &= replaced
            (staging / name).chmod(modes.get(name, mode))
    # until the files are moved, whoever may read the folder reads through this one
    staging.chmod(stat.S_IMODE(folder.stat().st_mode))


def _finish(folder: Path) -> None:
    """Move what is pending to its places, or set it aside where it is not a save's or is out of date."""
    pending = folder / PENDING
    if not os.path.lexists(pending):
        return
    try:
        changes = recognise(pending)
    except CheckpointError as error:
        _set_aside(pending, str(error))
        return
    if not fits(folder, changes):
        _set_aside(pending, f"{pending}: a save that was cut off, and other files were saved here since")
        return
    for name, change in changes.items():
        if change.new is None:
            (folder / name).unlink(missing_ok=True)
        elif (pending / name).exists():
            os.replace(pending / name, folder / name)
    flush(folder)
    (pending / MANIFEST).unlink(missing_ok=True)
    pending.rmdir()
    flush(folder)


def _set_aside(pending: Path, reason: str) -> None:
    aside = pending.with_name(_ASIDE + secrets.token_hex(4))
    os.rename(pending, aside)
    flush(pending.parent)
    warn(f"{reason}. It is kept as {aside}")


def _clear_abandoned(folder: Path) -> None:
    """Remove staging folders that no living process holds."""
    for path in folder.glob(_STAGING + "*"):
        if not path.is_symlink():
            with contextlib.suppress(OSError), _locked(path, wait=False):
                _remove(path)


def _remove(staging: Path) -> None:
    """Remove a staging folder; whatever a save does not write stays, and the folder with it."""
    with contextlib.suppress(OSError):
        for path in staging.iterdir():
            if is_plain(path.name) or path.name == MANIFEST or path.suffix == PARTIAL:
                path.unlink()
        staging.rmdir()


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock, which the system drops when the process ends.

    Raises:
        BlockingIOError: Another process holds it, and ``wait`` is not set.
        CheckpointError: It held it for too long.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, folder, wait)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, wait: bool) -> None:
    began, warned = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not wait:
                raise
        except OSError:  # some network file systems have no locks: there one process must save at a time
            return
        waited = time.monotonic() - began
        if waited > _PATIENCE:
            raise CheckpointError(
                f"{folder}: another program has held its lock for {_PATIENCE:.0f} s; nothing was saved"
            )
        if waited > _SILENCE and not warned:
            warn(f"{folder}: waiting for another program that holds its lock")
            warned = True
        time.sleep(_PAUSE)
