"""The header of a GGUF file: its metadata, and where each tensor lies.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: magic, version, the
numbers of tensors and of fields; the fields, each a name, a type and a value; for each tensor its name, sizes
(the innermost first), block format and offset; the data. The ``gguf`` library's own reader trusts the counts
that a file gives: on a damaged one it walks through arrays without end, so that only its tables of formats
and its ``dequantize`` are used.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptkern.checkpoint.errors import CheckpointError, shown
from gptkern.checkpoint.files import map_file, open_regular

MAGIC = b"GGUF"
# Formats that are read. Q8_0, Q4_0 and Q4_1 have blocks of 32 numbers, the others with a K of 256.
FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_VERSIONS = (2, 3)
_LARGEST_HEADER = 64 << 20
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# the numbers of the format's types, as numpy has them
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file.

    Attributes:
        name: Its name there.
        format: One of ``FORMATS``.
        shape: Its sizes, the outermost first: ``(outputs, inputs)``.
        start, end: Its bytes in the file.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file whose header was read.

    Attributes:
        path: Where it lies.
        raw: Its bytes.
        fields: The metadata: numbers, text, and arrays as lists.
        tensors: By name; every one lies within the file.
    """

    path: Path
    raw: torch.Tensor
    fields: dict[str, Any]
    tensors: dict[str, Entry]


def library() -> Any:
    """The ``gguf`` library.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError("GGUF files need the package gguf: pip install 'gptkern[gguf]'") from None
    return gguf


def is_gguf(path: Path) -> bool:
    """True if a file begins as GGUF files do."""
    try:
        with open_regular(path) as file:
            return file.read(4) == MAGIC
    except CheckpointError:
        return False


class _Reader:
    """The header's bytes, read one after another, never beyond the file."""

    def __init__(self, path: Path, raw: torch.Tensor) -> None:
        self.path, self.place = path, 0
        self._bytes = raw.numpy().data
        self._end = min(len(raw), _LARGEST_HEADER)

    def refuse(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")

    def take(self, size: int) -> memoryview:
        if size > self._end - self.place:
            if self._end < len(self._bytes):
                raise self.refuse(f"the header is longer than the {_LARGEST_HEADER:,} bytes that are read")
            raise self.refuse(f"truncated: {size:,} bytes are needed at byte {self.place:,} of {self._end:,}")
        self.place += size
        return self._bytes[self.place - size : self.place]

    def count(self, what: str, smallest: int) -> int:
        """A number of things that take ``smallest`` bytes each, or more."""
        number = self.number("<Q")
        if number * smallest > self._end - self.place:
            raise self.refuse(f"truncated: {number:,} {what} do not fit into what follows")
        return number

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def text(self) -> str:
        size = self.number("<Q")
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError:
            raise self.refuse(f"text that is not UTF-8 at byte {self.place - size:,}") from None

    def value(self, name: str) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return np.frombuffer(self.take(_NUMBERS[kind].itemsize), _NUMBERS[kind])[0].item()
        if kind != _ARRAY:
            raise self.refuse(f"{shown(name)}: a value of type {kind}, which GGUF does not have")
        inner = self.number("<I")
        if inner == _STRING:
            return [self.text() for _ in range(self.count(f"texts of {shown(name)}", 8))]
        if inner not in _NUMBERS:
            raise self.refuse(f"{shown(name)}: an array of type {inner}; numbers or texts are read")
        dtype = _NUMBERS[inner]
        size = self.count(f"numbers of {shown(name)}", dtype.itemsize)
        return np.frombuffer(self.take(size * dtype.itemsize), dtype).tolist()


def read_header(path: Path) -> GGUFFile:
    """The metadata and the places of a GGUF file's tensors.

    Raises:
        CheckpointError: The ``gguf`` library is missing, or the file is damaged, truncated, of another
            version or byte order, in parts, or has a block format that is not read.
    """
    sizes = library().GGML_QUANT_SIZES
    raw = map_file(path)
    reader = _Reader(path, raw)
    if bytes(reader.take(4)) != MAGIC:
        raise reader.refuse("not a GGUF file")
    version = reader.number("<I")
    if version not in _VERSIONS:
        problem = "big-endian numbers" if version & 0xFFFF == 0 else f"version {version}"
        raise reader.refuse(f"a GGUF file of {problem}; little-endian ones of version 2 and 3 are read")
    tensor_count, field_count = reader.count("tensors", 24), reader.count("fields", 13)
    fields = _each_once(reader, "field", field_count, reader.value)
    if fields.get("split.count", 0) not in (0, 1):
        raise reader.refuse("one of several parts: merge them by llama.cpp's gguf-split --merge")
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.refuse(f"general.alignment is {shown(alignment)}; a power of 2 is needed")
    infos = _each_once(reader, "tensor", tensor_count, lambda _: _info(reader))
    data_start = -(-reader.place // alignment) * alignment
    formats = {int(kind): kind.name for kind in sizes}
    tensors = {}
    for name, (shape, kind, offset) in infos.items():
        format = formats.get(kind, f"unknown format {kind}")
        if format not in FORMATS:
            raise reader.refuse(f"{shown(name)} is in {format}; block formats read are {', '.join(FORMATS)}")
        block, size = sizes[library().GGMLQuantizationType[format]]
        if shape[-1] % block:
            raise reader.refuse(f"{shown(name)}: rows of {shape[-1]} numbers in blocks of {block} ({format})")
        if offset % alignment:
            raise reader.refuse(f"{shown(name)}: offset {offset:,} is no multiple of {alignment}")
        start = data_start + offset
        tensors[name] = Entry(name, format, shape, start, start + math.prod(shape) // block * size)
    last = max((entry.end for entry in tensors.values()), default=0)
    if last > len(raw):
        raise reader.refuse(f"truncated: {last:,} bytes expected, {len(raw):,} found")
    return GGUFFile(path, raw, fields, tensors)


def _each_once(reader: _Reader, what: str, count: int, value: Callable[[str], Any]) -> dict[str, Any]:
    """Names and what follows each."""
    found: dict[str, Any] = {}
    for _ in range(count):
        name = reader.text()
        if name in found:
            raise reader.refuse(f"the {what} {shown(name)} is in it twice")
        found[name] = value(name)
    return found


def _info(reader: _Reader) -> tuple[tuple[int, ...], int, int]:
    """(shape, format, offset) of a tensor."""
    dimensions = reader.number("<I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise reader.refuse(f"a tensor of {dimensions} dimensions; 1 to {_MOST_DIMENSIONS} are read")
    shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
    if not all(0 < size < 1 << 31 for size in shape):
        raise reader.refuse(f"a tensor of shape {shape}; sizes of 1 to 2^31 - 1 are needed")
    return shape, reader.number("<I"), reader.number("<Q")
