"""Tensors lying in files: known by name, shape and dtype first, mapped into memory when read.

A mapping's pages are read from the file on first touch and given back once their tensor has been
copied (``release``), so that a load holds the model and about one tensor more, by any measure of memory.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptkern.checkpoint.errors import CheckpointError, first_line, shown
from gptkern.checkpoint.files import LARGEST_JSON, map_file
from gptkern.durable import Writer

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_MOST_DIMENSIONS = 64
# A tensor to write: its name, the tensor, and how it is stored where that is not as it is.
Entry = tuple[str, torch.Tensor, Callable[[torch.Tensor], torch.Tensor] | None]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a mapped file. Whoever makes one has checked that its elements lie within the file.

    Attributes:
        file: The file it lies in.
        name: Its name there.
        dtype: Its elements' type.
        shape: Its sizes.
        raw: The file's bytes.
        start: The byte where its first element begins.
        stride: Steps between elements along each dimension; None where they lie one after another.
        swapped: The bytes of each number lie the other way round.
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    raw: torch.Tensor
    start: int
    stride: tuple[int, ...] | None = None
    swapped: bool = False

    @property
    def data(self) -> torch.Tensor:
        """The tensor: a view of the file, or a copy where the machine cannot compute with it as it lies."""
        begin, end = self._range()
        span = self.raw[begin:end]
        if self.swapped:
            number = self.dtype.itemsize // 2 if self.dtype.is_complex else self.dtype.itemsize
            span = span.view(-1, number).flip(1).flatten()
        elif begin % self.dtype.itemsize:
            span = span.clone()  # vectorised code takes elements for aligned, and crashes
        elements = span.view(self.dtype)
        return (
            elements.view(self.shape) if self.stride is None else elements.as_strided(self.shape, self.stride)
        )

    @property
    def spans(self) -> list[tuple[Path, int, int]]:
        """The file, and where its bytes begin and end there; several where it is put together."""
        return [(self.file, *self._range())]

    def same_place(self, other: StoredTensor) -> bool:
        """True if the two are one tensor under two names."""
        return self.raw is other.raw and (self.start, self.shape, self.stride, self.dtype) == (
            other.start,
            other.shape,
            other.stride,
            other.dtype,
        )

    def release(self) -> None:
        """Give the pages back. The tensor stays readable: they would be read from the file again."""
        release_bytes(self.raw, *self._range())

    def _range(self) -> tuple[int, int]:
        """The bytes from its first element to its last."""
        elements = math.prod(self.shape)
        if elements and self.stride is not None:
            elements = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.start, self.start + elements * self.dtype.itemsize


@dataclass(frozen=True)
class StackedTensor(StoredTensor):
    """A parameter of several tensors in files, their rows one after another; or of one in another order.

    Attributes:
        parts: At least one.
        transposed: They are stored as ``(in, out)``.
        heads: Not 0 where the rows are those of so many heads, each head's query rows, key rows and value
            rows one after another; the parameter has all queries first.
    """

    parts: tuple[StoredTensor, ...] = ()
    transposed: bool = False
    heads: int = 0

    @classmethod
    def of(cls, parts: Sequence[StoredTensor], transposed: bool = False, heads: int = 0) -> StackedTensor:
        """The parameter that ``parts`` make.

        Raises:
            CheckpointError: They do not fit together.
        """
        first = parts[0]
        shapes = [tuple(reversed(part.shape)) if transposed else part.shape for part in parts]
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise CheckpointError(
                f"{first.file}: tensors whose rows have one length expected, found: "
                f"{', '.join(f'{part.name} {part.shape}' for part in parts)}"
            )
        rows = sum(shape[0] for shape in shapes)
        if heads and rows % (3 * heads):
            raise CheckpointError(f"{first.file}: {first.name} has {rows} rows for {heads} heads")
        dtypes = [part.dtype for part in parts]
        odd = next((dtype for dtype in dtypes if not dtype.is_floating_point), None)
        dtype = odd or functools.reduce(torch.promote_types, dtypes)
        name = ", ".join(part.name for part in parts)
        shape = (rows, *shapes[0][1:])
        return cls(
            *(first.file, name, dtype, shape, first.raw, first.start),
            parts=tuple(parts),
            transposed=transposed,
            heads=heads,
        )

    @property
    def data(self) -> torch.Tensor:
        """The parameter, a copy of its parts."""
        views = [part.data.t() if self.transposed else part.data for part in self.parts]
        stacked = views[0] if len(views) == 1 else torch.cat(views)
        if not self.heads:
            return stacked
        by_head: torch.Tensor = stacked.unflatten(0, (self.heads, 3, -1))
        return by_head.transpose(0, 1).flatten(0, 2)

    @property
    def spans(self) -> list[tuple[Path, int, int]]:
        """The bytes of all parts."""
        return [span for part in self.parts for span in part.spans]

    def same_place(self, other: StoredTensor) -> bool:
        """True if the two are one parameter under two names."""
        return isinstance(other, StackedTensor) and all(
            own.same_place(part) for own, part in zip(self.parts, other.parts, strict=False)
        )

    def release(self) -> None:
        """Give the pages of all parts back."""
        for part in self.parts:
            part.release()


def release_bytes(raw: torch.Tensor, begin: int, end: int) -> None:
    """Give the pages of a mapped file's bytes back, those that they share with others too."""
    if begin == end:
        return
    start = raw.data_ptr() + begin
    aligned = start - start % mmap.PAGESIZE
    _libc.madvise(aligned, start + end - begin - aligned, mmap.MADV_DONTNEED)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a ``.safetensors`` file.

    The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, little-endian;
    the header, a JSON object from names to dtype, shape and ``data_offsets``; the data, without gaps.
    """
    raw = map_file(path)
    header_end = 8 + int.from_bytes(raw[:8].numpy().tobytes(), "little")
    if len(raw) < 8 or header_end > len(raw):
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: its header ends at byte {header_end:,}, "
            f"the file at {len(raw):,}"
        )
    if header_end - 8 > LARGEST_JSON:
        raise CheckpointError(
            f"{path}: a header of {header_end - 8:,} bytes found; at most {LARGEST_JSON:,} are read"
        )
    try:
        header = json.loads(raw[8:header_end].numpy().tobytes(), object_pairs_hook=_each_once)
        if not isinstance(header, dict):
            raise TypeError(f"an object is needed, {type(header).__name__} found")
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is malformed: {first_line(error)}") from error
    header.pop("__metadata__", None)
    entries = [(name, *_entry(f"{path}: {name}", entry)) for name, entry in header.items()]
    data_bytes = len(raw) - header_end
    tensors, expected = {}, 0
    for name, dtype, shape, start, end in sorted(entries, key=lambda entry: entry[3:]):
        size = math.prod(shape) * dtype.itemsize
        if start != expected or end - start != size:
            raise CheckpointError(
                f"{path}: {name}: bytes {start:,} to {end:,} found; shape {shape} in {DTYPE_NAMES[dtype]} "
                f"needs {size:,} bytes from {expected:,}"
            )
        expected = end
        if end <= data_bytes:
            tensors[name] = StoredTensor(path, name, dtype, shape, raw, header_end + start)
    if expected != data_bytes:
        state = "truncated" if expected > data_bytes else "longer than its header says"
        raise CheckpointError(
            f"{path}: {state}: {expected:,} bytes of tensors expected, {data_bytes:,} found"
        )
    return tensors


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name is in it twice")
    return entries


def _entry(where: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """A tensor's dtype, shape, and where its bytes begin and end."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: an object is needed, {shown(entry)} found")
    dtype_name, offsets = entry.get("dtype"), entry.get("data_offsets")
    dtype = SAFETENSORS_DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: dtype {shown(dtype_name)} found; supported are {', '.join(SAFETENSORS_DTYPES)}"
        )
    shape, ends = (
        tensor_sizes(where, "shape", entry.get("shape")),
        tensor_sizes(where, "data_offsets", offsets),
    )
    if len(ends) != 2:
        raise CheckpointError(f"{where}: data_offsets is {shown(offsets)}; a begin and an end are needed")
    return dtype, shape, *ends


def tensor_sizes(where: str, field: str, values: object) -> tuple[int, ...]:
    """Sizes, strides or offsets that a file gives for a tensor.

    Raises:
        CheckpointError: They are anything but a few integers from 0 to 2^63 - 1.
    """
    if isinstance(values, tuple | list) and len(values) <= _MOST_DIMENSIONS:
        sizes = tuple(n for n in values if type(n) is int and 0 <= n < 2**63)
        if len(sizes) == len(values):
            return sizes
    raise CheckpointError(f"{where}: {field} is {shown(values)}; integers from 0 to 2^63 - 1 are needed")


def write_safetensors(file: Writer, tensors: Sequence[Entry]) -> None:
    """Write entries one at a time, so that one tensor at most is held in memory twice.

    Equal tensors give equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # wide dtypes first keep every tensor aligned to its dtype
    tensors = sorted(tensors, key=lambda entry: -entry[1].element_size())
    start = 0
    for name, tensor, layout in tensors:
        shape = list(tensor.shape if layout is None else layout(tensor.detach().to("meta")).shape)
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for _, tensor, layout in tensors:
        values = tensor.detach()
        data = (values if layout is None else layout(values)).cpu().contiguous()
        file.write(data.flatten().view(torch.uint8).numpy().data)
