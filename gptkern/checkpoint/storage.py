"""Tensors lying in files: known by name, shape and dtype first, mapped into memory when read.

A mapping's pages are read from the file on first touch and given back once their tensor has been
copied (``release``), so that a load holds the model and about one tensor more, by any measure of memory.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptkern.checkpoint.errors import CheckpointError

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
# how torch's restricted unpickler speaks of classes and functions, as opposed to damage
_CODE = re.compile(r"[^\n]*(GLOBAL \S+|Unsupported class|Can only)[^.\n]*")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: The file it lies in.
        name: Its name there.
        data: The tensor, a view of the mapped file where ``mapped``.
        mapped: Whether its pages belong to the file and may be dropped after use.
    """

    file: Path
    name: str
    data: torch.Tensor
    mapped: bool

    def release(self) -> None:
        """Give the pages back. The tensor stays readable: they would be read from the file again."""
        if not self.mapped or not self.data.numel():
            return
        last = sum(
            (size - 1) * stride for size, stride in zip(self.data.shape, self.data.stride(), strict=True)
        )
        start = self.data.data_ptr()
        aligned = start - start % mmap.PAGESIZE
        end = start + (last + 1) * self.data.element_size()
        _libc.madvise(aligned, end - aligned, mmap.MADV_DONTNEED)


def map_file(path: Path) -> torch.Tensor:
    """The whole file as uint8, mapped privately; its pages are read when touched."""
    try:
        size = path.stat().st_size
        if size:
            return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
    raise CheckpointError(f"{path}: the file is empty")


def view(raw: torch.Tensor, start: int, dtype: torch.dtype, shape: Iterable[int]) -> torch.Tensor:
    """The tensor that begins at byte ``start`` of ``raw``, aligned or not: never a copy."""
    shape = tuple(shape)
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw.numpy(), dtype=dtype, count=math.prod(shape), offset=start).view(shape)


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
            tensors[name] = StoredTensor(path, name, view(raw, header_end + start, dtype, shape), mapped=True)
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


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, its tensors mapped where the file is of today's format.

    Nothing in the file is executed: anything but tensors, numbers, strings and plain containers is refused.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip()
        if refused := _CODE.search(reason):
            raise CheckpointError(
                f"{path}: not a plain state dict, and opening it could run code: {refused[0].strip()}"
            ) from error
        first = reason.splitlines()[0]
        raise CheckpointError(f"{path}: not a PyTorch checkpoint, or truncated: {first}") from error
    # a damaged file fails in as many ways as there are readers below
    except Exception as error:
        first = (str(error).splitlines() or [repr(error)])[0]
        raise CheckpointError(f"{path}: not a PyTorch checkpoint, or truncated: {first}") from error


def state_dict_tensors(path: Path, state_dict: object) -> dict[str, StoredTensor]:
    """The tensors of a pickled state dict."""
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path}: a state dict is needed, {type(state_dict).__name__} found")
    tensors = {}
    ranges = _mapped_ranges(path)
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: not a plain state dict: {name!r} is {type(value).__name__}; "
                "names with tensors are needed"
            )
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{path}: {name}: a dense tensor is needed, {value.layout} found")
        storage = value.untyped_storage()
        first, last = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        mapped = any(start <= first and last <= end for start, end in ranges)
        tensors[name] = StoredTensor(path, name, value.detach(), mapped)
    return tensors


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Where this process has the file mapped. Dropping pages anywhere else would destroy what is in them."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {path.resolve()}"):
            start, _, end = line.split(" ", 1)[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges
