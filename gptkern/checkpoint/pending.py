"""Reading a folder as its last complete save left it, without changing anything there.

A save (``replace``) becomes valid by one rename, to ``.gptkern-pending``, and then moves its files to their
places. Killed in between, it leaves that folder behind. Readers never tidy up: they look through it, taking
a file from there where it has not been moved yet (``read``). The next save finishes the moves.

A folder may come from anywhere, so the pending set is believed by what it holds and not by what it says:

* ``.gptkern-pending`` is a real folder with a manifest and regular files, no links and no folders in it.
* Its manifest names plain files of kinds that a model has, and gives for each the size and checksum of the
  new contents (None: the file goes) and of the old ones (None: there was no such file).
* Every file in it has the size and checksum that the manifest says. Anything else is a ``CheckpointError``
  for readers: what such a folder's model is cannot be known. The next save sets it aside.
* Every file of the model's folder is the old one or the new one. Where it is neither, another program has
  saved since: the pending set is out of date, readers pass it over with a warning, and the next save sets
  it aside.

Readers take no lock. They read, then look whether what they read has been replaced meanwhile, and if so read
again.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptkern._warn import warn
from gptkern.checkpoint.errors import CheckpointError
from gptkern.durable import Identity, identity

PENDING = ".gptkern-pending"
MANIFEST = ".manifest.json"
_FORMAT = 1
_LARGEST_MANIFEST = 1 << 24
_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".jinja", ".model")
# seconds that a reader waits: for a save that is moving its files, and for one quiet moment
_MOVES, _PATIENCE, _PAUSE = 2.0, 30.0, 0.005

T = TypeVar("T")


@dataclass(frozen=True)
class Change:
    """A save's change to one file, each state as size and CRC-32.

    Attributes:
        new: None: the file goes.
        old: None: there was none.
    """

    new: Identity | None
    old: Identity | None


def check_settled(folder: Path) -> None:
    """Refuse a folder that other programs would see half replaced.

    Raises:
        CheckpointError: A save was cut off there when it was complete.
    """
    if _elsewhere(folder):
        raise CheckpointError(
            f"{folder}: a save was cut off there when it was complete, and others would see half of it. "
            f"Save it again: GPT.from_pretrained({str(folder)!r}) and then save_pretrained({str(folder)!r})"
        )


class Files:
    """A folder's files by name: ``files / "config.json"`` is where that file's contents are.

    Attributes:
        folder: The folder, for messages.
    """

    def __init__(self, folder: Path, elsewhere: Mapping[str, Path]) -> None:
        self.folder = folder
        self._elsewhere = elsewhere
        self._marks: dict[Path, object] = {}

    def __truediv__(self, name: str) -> Path:
        path = self._elsewhere.get(name, self.folder / name)
        self._marks.setdefault(path, _mark(path))
        return path

    def __contains__(self, name: str) -> bool:
        """True if there is anything of that name.

        A device or a link to nothing is for the reader to refuse, and not to be passed over.
        """
        return os.path.lexists(self / name)

    def unchanged(self) -> bool:
        """True if every file that a reader has looked up is still the same."""
        return all(_mark(path) == mark for path, mark in self._marks.items())


def read(folder: Path, reader: Callable[[Files], T]) -> T:
    """The result of ``reader`` on files of ``folder`` that are all of one save, while others may be saving.

    It may be called again, where files were replaced while it read.

    Raises:
        CheckpointError: ``reader``'s own; what is left of a save there cannot be trusted; files are replaced
            faster than they can be read.
    """
    began = time.monotonic()
    while (waited := time.monotonic() - began) < _PATIENCE:
        before = _mark(folder / PENDING)
        if before is not None and waited < _MOVES and _is_moving(folder):
            time.sleep(_PAUSE)
            continue
        files, problem = Files(folder, {}), None
        try:
            files = Files(folder, _elsewhere(folder))
            result = reader(files)
        except (CheckpointError, OSError) as error:
            problem = error
        if before == _mark(folder / PENDING) and files.unchanged():
            if problem is not None:
                raise problem
            return result
        time.sleep(_PAUSE)
    raise CheckpointError(
        f"{folder}: its files were replaced whenever they were read, for {_PATIENCE:.0f} s: "
        "another program saves there without a pause"
    )


def _elsewhere(folder: Path) -> dict[str, Path]:
    """Paths of the files that a complete save has not moved yet; files that it removes have none."""
    pending = folder / PENDING
    if not os.path.lexists(pending):
        return {}
    try:
        changes = recognise(pending)
        up_to_date = fits(folder, changes)
    except OSError as error:
        raise CheckpointError(
            f"{pending}: a save that was cut off left this, and it cannot be read: {error}"
        ) from error
    if not up_to_date:
        warn(
            f"{folder}: a save that was cut off, in {PENDING}, is passed over: "
            "other files were saved here since"
        )
        return {}
    return {
        name: pending / name
        for name, change in changes.items()
        if change.new is None or (pending / name).exists()
    }


def recognise(pending: Path) -> dict[str, Change]:
    """The changes of a complete save that are not all made yet; none where its folder is empty.

    Raises:
        CheckpointError: It is not what a save leaves behind.
        OSError: It cannot be read, and so nothing is known of it.
    """
    try:
        return _recognise(pending)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{pending}: not what a save of gptkern leaves behind ({error}), and so the model beside it may "
            f"be half replaced. Nothing was changed. Move its files into {pending.parent} if you trust them, "
            "or delete it"
        ) from error


def _recognise(pending: Path) -> dict[str, Change]:
    if not stat.S_ISDIR(os.lstat(pending).st_mode):
        raise ValueError("it is not a folder")
    present = {entry.name: entry for entry in os.scandir(pending)}
    if not present:
        return {}
    for name, entry in present.items():
        if not entry.is_file(follow_symlinks=False):
            raise ValueError(f"{name!r} in it is not a regular file")
    if MANIFEST not in present:
        raise ValueError("it has no manifest")
    if present.pop(MANIFEST).stat(follow_symlinks=False).st_size > _LARGEST_MANIFEST:
        raise ValueError("its manifest is too long")
    manifest = json.loads((pending / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"its manifest is not of format {_FORMAT}")
    changes = {
        name: Change(_read_identity(entry["new"]), _read_identity(entry["old"]))
        for name, entry in manifest["files"].items()
    }
    for name in changes:
        if not is_plain(name):
            raise ValueError(f"its manifest names {name!r}, no plain file name of a model's")
    for name in present:
        if name not in changes or identity(pending / name) != changes[name].new:
            raise ValueError(f"{name!r} is not the file that its manifest describes")
    return changes


def _read_identity(data: Any) -> Identity | None:
    if data is None:
        return None
    size, checksum = data
    if type(size) is not int or type(checksum) is not int:
        raise ValueError("its manifest gives no size and checksum")
    return size, checksum


def manifest(changes: Mapping[str, Change]) -> str:
    """The manifest's text."""
    files = {name: {"new": change.new, "old": change.old} for name, change in changes.items()}
    return json.dumps({"format": _FORMAT, "files": files})


def is_plain(name: str) -> bool:
    """True if ``name`` is a file's in the folder itself, of a kind that a model or a tokenizer has."""
    plain = name == os.path.basename(name) and not name.startswith(".") and name.endswith(_SUFFIXES)
    # what the system takes as a name: no zero byte, no lone surrogate, not too long
    return plain and name.isprintable() and len(os.fsencode(name)) <= 255


def fits(folder: Path, changes: Mapping[str, Change]) -> bool:
    """True if every file of ``folder`` is the one that the save found, or the one that it put there.

    Raises:
        OSError: One cannot be read.
    """
    for name, change in changes.items():
        if not (folder / name).is_file() and os.path.lexists(folder / name):
            return False
        if identity(folder / name) not in _allowed(folder, name, change):
            return False
    return True


def _allowed(folder: Path, name: str, change: Change) -> tuple[Identity | None, ...]:
    if (folder / PENDING / name).exists():
        return (change.old,)
    return (change.old, None) if change.new is None else (change.new,)


def _is_moving(folder: Path) -> bool:
    """True if a living save holds the folder's lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some network file systems have no locks
        return False
    finally:
        os.close(descriptor)
    return False


def _mark(path: Path) -> object:
    """Something that differs where the file has been replaced or written to; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
