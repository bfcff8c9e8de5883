"""Writing files: they are whole and on the disk when the call returns, or an error names them.

Every write is checked, flushed from the program and from the system, and what lies on the disk is compared
with what was meant, by size and checksum. A file that takes the place of another is written beside it and
renamed, so that the old one or the new one is there at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

Identity = tuple[int, int]
Data = bytes | bytearray | memoryview

# how the names of files end that are not whole yet
PARTIAL = ".writing"
_CHUNK = 1 << 20
_IN_PLAIN_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the limit on file sizes",
    errno.EIO: "the disk reports an error",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write here",
    errno.EPERM: "no permission to write here",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
}


class Writer(Protocol):
    """Whatever takes bytes, one piece after another."""

    def write(self, data: Data, /) -> Any:
        """Append."""
        ...


class NewFile:
    """A file being written.

    Attributes:
        identity: Size and CRC-32 of what was written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity: Identity = (0, 0)
        with naming(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._file = os.fdopen(descriptor, "wb")
        except BaseException:  # no memory for the file's object: the file is there already
            with contextlib.suppress(OSError):
                os.close(descriptor)
            path.unlink()
            raise

    def write(self, data: Data, /) -> None:
        """Append."""
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        with naming(self.path):
            self._file.write(view)
        size, checksum = self.identity
        self.identity = size + len(view), zlib.crc32(view, checksum)

    def finish(self) -> None:
        """Flush to the disk and compare.

        Raises:
            OSError: It could not be written, or does not read back as it was written.
        """
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if identity(self.path) != self.identity:
                raise OSError(errno.EIO, "what was written does not read back as it was", str(self.path))

    def discard(self) -> None:
        """Close and remove it."""
        with contextlib.suppress(OSError):
            # closing tries once more to write what is buffered
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """Write a file that is not there yet; an error within the block removes it.

    Raises:
        OSError: It is there, or cannot be written; the message says why in plain words.
    """
    file = NewFile(path)
    try:
        yield file
        file.finish()
    except BaseException:
        file.discard()
        raise


def write_file(path: Path, data: Data | str, *, through_links: bool = True) -> None:
    """Write a file whole, in the place of one that is there; text as UTF-8.

    It keeps the permissions of the one it replaces. What is no regular file (a pipe, ``/dev/stdout``) is
    written into.

    Args:
        through_links: Write what a link leads to. False puts the file in the link's place: for names that the
            program chose, in a folder that may come from anywhere.

    Raises:
        OSError: It cannot be written; the one that was there is untouched.
    """
    data = data.encode() if isinstance(data, str) else data
    if through_links:
        path = Path(os.path.realpath(path))
    mode = None
    with naming(path), contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
    if mode is not None and stat.S_ISLNK(mode):
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with naming(path):
            path.write_bytes(data)
        return
    partial = path.with_name(f".{secrets.token_hex(4)}{PARTIAL}")
    with new_file(partial) as file:
        file.write(data)
        if mode is not None:
            partial.chmod(stat.S_IMODE(mode))
    try:
        with naming(path):
            os.replace(partial, path)
            flush(path.parent)
    except BaseException:
        file.discard()
        raise


def no_link(path: Path) -> Path:
    """The path of a file to write whose name the program chose, in a folder that may come from anywhere.

    Raises:
        OSError: It is a link, which would have a file written that nobody named.
    """
    if path.is_symlink():
        told = f"a link to {os.readlink(path)!r}: nothing is written through it; remove it first"
        raise OSError(errno.ELOOP, told, str(path))
    return path


def named_folder(caller: str, folder: str | Path) -> Path:
    """The folder as a path.

    Raises:
        ValueError: It is empty text, which would be the working folder.
    """
    if folder == "":
        raise ValueError(f"{caller}: folder is ''; a folder's name is needed ('.' is the working folder)")
    return Path(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        OSError: It cannot be made, or a file is there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            flush(path.parent)


def flush(path: Path) -> None:
    """Make the system write a file's contents, or a folder's names, to the disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def identity(path: Path) -> Identity | None:
    """Size and CRC-32 of a file's contents; None where there is no such file.

    Raises:
        OSError: It cannot be read, or is a folder, a pipe or a device.
    """
    try:
        # a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "a regular file is needed here", str(path))
        size, checksum, chunk = 0, 0, memoryview(bytearray(_CHUNK))
        while count := file.readinto(chunk):
            size += count
            checksum = zlib.crc32(chunk[:count], checksum)
    return size, checksum


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an ``OSError`` of the block, and say in plain words what is wrong."""
    try:
        yield
    except OSError as error:
        words = _IN_PLAIN_WORDS.get(error.errno or 0)
        if words is None and error.filename is not None:
            raise
        told = error.strerror or str(error)
        message = told if words is None or words in told else f"{words} ({told})"
        raise OSError(error.errno or errno.EIO, message, str(path)) from error
