"""Tensors lying in files: known by name, shape and dtype first, mapped into memory when read.

A mapping's pages are read from the file on first touch and given back once their tensor has been
copied (``release``), so that a load holds the model and about one tensor more, by any measure of memory.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.files import map_file

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
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_LONGEST_HEADER = 100_000_000

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

    def same_place(self, other: StoredTensor) -> bool:
        """Whether the two are one tensor under two names."""
        return self.raw is other.raw and (self.start, self.shape, self.stride, self.dtype) == (
            other.start,
            other.shape,
            other.stride,
            other.dtype,
        )

    def release(self) -> None:
        """Give the pages back. The tensor stays readable: they would be read from the file again."""
        begin, end = self._range()
        if begin == end:
            return
        start = self.raw.data_ptr() + begin
        aligned = start - start % mmap.PAGESIZE
        _libc.madvise(aligned, start + end - begin - aligned, mmap.MADV_DONTNEED)

    def _range(self) -> tuple[int, int]:
        """The bytes from its first element to its last."""
        elements = math.prod(self.shape)
        if elements and self.stride is not None:
            elements = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.start, self.start + elements * self.dtype.itemsize


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a ``.safetensors`` file.

    The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, little-endian;
    the header, a JSON object from names to dtype, shape and ``data_offsets``; the data, without gaps.
    """
    raw = map_file(path)
    header_end = 8 + int.from_bytes(raw[:8].numpy().tobytes(), "little")
    if len(raw) < 8 or header_end - 8 > _LONGEST_HEADER or header_end > len(raw):
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: its header ends at byte {header_end:,}, "
            f"the file at {len(raw):,}"
        )
    try:
        header = json.loads(raw[8:header_end].numpy().tobytes())
        header.pop("__metadata__", None)
        entries = [
            (name, entry["dtype"], [int(n) for n in entry["shape"]], *map(int, entry["data_offsets"]))
            for name, entry in header.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is malformed: {error!r}") from error
    data_bytes = len(raw) - header_end
    tensors, expected = {}, 0
    for name, dtype_name, shape, start, end in sorted(entries, key=lambda entry: entry[3:]):
        dtype = SAFETENSORS_DTYPES.get(dtype_name)
        if dtype is None:
            raise CheckpointError(
                f"{path}: {name}: dtype {dtype_name} found; supported are {', '.join(SAFETENSORS_DTYPES)}"
            )
        if start != expected or min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: {name}: bytes {start:,} to {end:,} found; shape {tuple(shape)} in {dtype_name} "
                f"needs {math.prod(shape) * dtype.itemsize:,} bytes from {expected:,}"
            )
        expected = end
        if end <= data_bytes:
            tensors[name] = StoredTensor(path, name, dtype, tuple(shape), raw, header_end + start)
    if expected != data_bytes:
        state = "truncated" if expected > data_bytes else "longer than its header says"
        raise CheckpointError(
            f"{path}: {state}: {expected:,} bytes of tensors expected, {data_bytes:,} found"
        )
    return tensors


def write_safetensors(path: Path, tensors: list[tuple[str, torch.Tensor, bool]]) -> None:
    """Write ``(name, tensor, transpose)`` one at a time, so that one tensor at most is held in memory twice.

    Equal tensors give equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # wide dtypes first keep every tensor aligned to its dtype
    tensors = sorted(tensors, key=lambda entry: -entry[1].element_size())
    start = 0
    for name, tensor, transpose in tensors:
        shape = list(reversed(tensor.shape) if transpose else tensor.shape)
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, tensor, transpose in tensors:
            data = (tensor.t() if transpose else tensor).detach().cpu().contiguous()
            data.flatten().view(torch.uint8).numpy().tofile(file)
