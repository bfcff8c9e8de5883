"""Opening files for reading: every reader of a model's files does it here.

A model's files may come from anybody. Only regular files are opened (nothing waits for a FIFO, or reads a
device that has no end), and none is read whole into memory before its size is known to be in bounds.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gptkern.checkpoint.errors import CheckpointError, first_line, shown

LARGEST_JSON = 16 << 20
LARGEST_VOCABULARY = 256 << 20
_DEEPEST_JSON = 100

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path) -> BinaryIO:
    """A file, open for reading.

    Raises:
        CheckpointError: There is none, it may not be read, or it is not a regular file.
    """
    try:
        # O_NONBLOCK: the opening of a FIFO does not wait until somebody writes into it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    # ValueError: a name with a zero byte, or that the file system's encoding cannot express
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {_reason(error)}") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise CheckpointError(f"{path}: a regular file is needed, {_KINDS.get(kind, 'none')} found")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole file of at most ``limit`` bytes.

    Raises:
        CheckpointError: It cannot be opened, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size:,} bytes found; at most {limit:,} are read")
        try:
            # a file that grows while it is read, and one of /proc, whose size says 0, are cut here
            content = file.read(limit + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
    if len(content) > limit:
        raise CheckpointError(f"{path}: more than {limit:,} bytes found, which is the most that is read")
    return content


def read_text(path: Path, limit: int) -> str:
    """A whole file of UTF-8.

    Raises:
        CheckpointError: It cannot be opened, is larger than ``limit`` bytes, or is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {first_line(error)}") from error


def read_json(path: Path, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: It cannot be opened, is larger than ``limit`` bytes, or is something else.
    """
    return parse_json(path, read_bytes(path, limit))


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """The object that JSON of a file holds.

    Raises:
        CheckpointError: It is something else.
    """
    try:
        data = json.loads(content.decode())
    # RecursionError: lists within lists, thousands deep; ValueError: an integer of thousands of digits, too
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON, or truncated: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, {type(data).__name__} found")
    level: list[Any] = [data]
    for _ in range(_DEEPEST_JSON):
        level = [inner for value in level for inner in _inside(value) if isinstance(inner, dict | list)]
        if not level:
            return data
    # whoever walks through it does so by calling itself
    raise CheckpointError(f"{path}: lists and objects within one another more than {_DEEPEST_JSON} deep")


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def map_file(path: Path) -> torch.Tensor:
    """The whole file as uint8, mapped privately; its pages are read when touched.

    Raises:
        CheckpointError: It cannot be opened, or is empty.
    """
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{path}: truncated: the file is empty")
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped: {_reason(error)}") from error
    return torch.frombuffer(mapped, dtype=torch.uint8)


def check_file_name(where: str, name: object) -> str:
    """A name that a file gives to another file beside it: a plain one, in that folder.

    Raises:
        CheckpointError: It is none; the message begins with ``where``.
    """
    plain = isinstance(name, str) and name == Path(name).name and name not in ("", "..") and "\\" not in name
    if not plain or not isinstance(name, str) or not name.isprintable() or len(os.fsencode(name)) > 255:
        raise CheckpointError(
            f"{where} points outside its folder, to {shown(name)}; a plain file name is needed"
        )
    return name


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
