"""Pickles, read without running any of their code.

A pickle is a program: it names functions, and has them called. The names found here are looked up in one
table of functions that build plain values and descriptions of tensors; any other name is refused. Sizes
are checked against the file's bytes when a tensor is asked for, and before anything is allocated.

Two formats hold tensors (torch/serialization.py): since PyTorch 1.6 a zip archive, with the pickle in
``data.pkl`` and each storage a record of its own in ``data/``; before it, a row of pickles (magic number,
version, system, object, storages' keys) and then each storage, its length in 8 bytes before it. In both a
tensor is pickled as a call of ``_rebuild_tensor_v2`` with its storage, offset, shape and strides.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from gptkern.checkpoint.errors import CheckpointError, first_line, shown
from gptkern.checkpoint.files import map_file, open_regular, read_bytes
from gptkern.checkpoint.storage import StoredTensor, tensor_sizes

# the pickle of GPT-2 XL with its optimizer's state takes 0.6 MB
LARGEST_PICKLE = 4 << 20
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class _Refused(Exception):
    """A name that is not in the table."""


class _Opaque:
    """Stands for a value that nothing here needs."""

    def __init__(self, *_: object) -> None:
        pass


# without a repr of their fields: what a pickle puts there may be small in memory and endless in text
@dataclass(frozen=True, repr=False)
class _Storage:
    archive: _Archive
    dtype: torch.dtype
    key: str
    count: object


@dataclass(frozen=True, repr=False)
class _Tensor:
    """A tensor as it was pickled; nothing of it is checked yet."""

    storage: object
    offset: object
    shape: object
    stride: object
    dtype: object = None
    metadata: object = None


@dataclass(frozen=True)
class _Unsupported:
    """A tensor of another layout, or of a class of its own."""

    kind: str


@dataclass
class _Archive:
    """The places of storages in a file: first byte and size, by key."""

    path: Path
    raw: torch.Tensor
    swapped: bool = False
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_plain(path: Path) -> object:
    """The contents of a pickle that is made of dicts, lists, tuples, sets, text and numbers alone.

    Raises:
        CheckpointError: It cannot be read, or holds something else.
    """
    try:
        return _Unpickler(io.BytesIO(read_bytes(path, LARGEST_PICKLE)), {}).load()
    except CheckpointError:
        raise
    except _Refused as error:
        raise CheckpointError(
            f"{path}: plain values are needed, and opening it could run code: {error}"
        ) from error
    # a damaged pickle fails in as many ways as it has operations
    except Exception as error:
        raise CheckpointError(f"{path}: not a pickle, or truncated: {first_line(error)}") from error


def read_torch(path: Path, way_out: str) -> object:
    """The contents of a file of ``torch.save``; ``state_dict_tensors`` takes its tensors.

    Args:
        way_out: Of a file that holds more than tensors and plain values: an expression of what to keep of
            ``c``, all of it. It is shown to people who trust the file.

    Raises:
        CheckpointError: It cannot be read, or names a class or function that is not in the table.
    """
    archive = _Archive(path, map_file(path))
    if archive.raw[:4].numpy().tobytes() == _ZIP_MAGIC:
        return _read_zip(archive, way_out)
    return _read_legacy(archive, way_out)


def state_dict_tensors(path: Path, state_dict: object) -> dict[str, StoredTensor]:
    """The tensors of a state dict that ``read_torch`` returned.

    Raises:
        CheckpointError: It holds something else, or a tensor that the file does not.
    """
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path}: a state dict is needed, {type(state_dict).__name__.strip('_')} found")
    tensors = {}
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor | _Unsupported):
            raise CheckpointError(
                f"{path}: not a plain state dict: {shown(name)} is {type(value).__name__.strip('_')}; "
                "names with tensors are needed"
            )
        if isinstance(value, _Unsupported):
            raise CheckpointError(f"{path}: {name}: a dense tensor is needed, {value.kind} found")
        tensors[name] = _stored(path, name, value)
    return tensors


def _stored(path: Path, name: str, tensor: _Tensor) -> StoredTensor:
    where = f"{path}: {name}"
    storage = tensor.storage
    if not isinstance(storage, _Storage) or tensor.metadata:
        raise CheckpointError(f"{where}: a dense tensor is needed, another kind found")
    dtype = storage.dtype if tensor.dtype is None else tensor.dtype
    if not isinstance(dtype, torch.dtype) or dtype in _QUANTISED.values():
        raise CheckpointError(f"{where}: a dtype is needed, {shown(dtype)} found")
    shape = tensor_sizes(where, "shape", tensor.shape)
    stride = tensor_sizes(where, "stride", tensor.stride)
    offset, claimed = tensor_sizes(where, "offset and length", (tensor.offset, storage.count))
    if len(shape) != len(stride):
        raise CheckpointError(f"{where}: {len(shape)} sizes and {len(stride)} strides found")
    if storage.key not in storage.archive.places:
        raise CheckpointError(f"{where}: its data, {shown(storage.key)}, is not in the file")
    start, size = storage.archive.places[storage.key]
    if claimed * storage.dtype.itemsize != size:
        raise CheckpointError(
            f"{where}: {claimed * storage.dtype.itemsize:,} bytes of data expected, {size:,} found"
        )
    held, count = size // dtype.itemsize, math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if count and (last >= held or count > held):
        raise CheckpointError(
            f"{where}: shape {shape} with strides {stride} from element {offset:,} found; its data has "
            f"{held:,} elements, each of which may be used once"
        )
    archive = storage.archive
    begin = start + offset * dtype.itemsize if count else start
    return StoredTensor(path, name, dtype, shape, archive.raw, begin, stride, archive.swapped)


def _read_zip(archive: _Archive, way_out: str) -> object:
    path = archive.path
    records: dict[str, tuple[int, int]] = {}
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as directory:
            members = directory.infolist()
    # the directory is damaged, in any of the ways that zipfile has errors for
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or truncated: {first_line(error)}"
        ) from error
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise CheckpointError(f"{path}: a state dict is needed, a TorchScript program found")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise CheckpointError(
                f"{path}: {shown(member.filename)} in it is compressed or encrypted; PyTorch stores records "
                "as they are: unpack the file and pack it again with `zip -0`"
            )
        # the records lie in one folder, of any name
        name = member.filename.partition("/")[2]
        if name in records:
            raise CheckpointError(f"{path}: {shown(member.filename)} is in it twice")
        records[name] = _place(archive, member)
    if "data.pkl" not in records:
        raise CheckpointError(f"{path}: not a PyTorch checkpoint: a zip archive without data.pkl")
    order = _record(archive, records.get("byteorder", (0, 0)), 16) or b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(f"{path}: byteorder is {shown(order)}; little or big is needed")
    archive.swapped = order.decode() != sys.byteorder
    archive.places = {name[5:]: place for name, place in records.items() if name.startswith("data/")}
    stream = io.BytesIO(_record(archive, records["data.pkl"], LARGEST_PICKLE))
    return _unpickle(archive, stream, way_out)


def _place(archive: _Archive, member: zipfile.ZipInfo) -> tuple[int, int]:
    """The place of a stored record's bytes: after its local header, which repeats the name."""
    begin = member.header_offset + _LOCAL_HEADER.size
    header = archive.raw[member.header_offset : begin].numpy().tobytes()
    if len(header) == _LOCAL_HEADER.size:
        magic, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        begin += name_size + extra_size
        if magic == _ZIP_MAGIC and begin + member.file_size <= len(archive.raw):
            return begin, member.file_size
    raise CheckpointError(
        f"{archive.path}: not a PyTorch checkpoint, or truncated: {shown(member.filename)} reaches beyond it"
    )


def _record(archive: _Archive, place: tuple[int, int], limit: int) -> bytes:
    start, size = place
    if size > limit:
        raise CheckpointError(f"{archive.path}: a pickle of {size:,} bytes; at most {limit:,} are read")
    return archive.raw[start : start + size].numpy().tobytes()


def _read_legacy(archive: _Archive, way_out: str) -> object:
    path, raw = archive.path, archive.raw
    stream = io.BytesIO(raw[:LARGEST_PICKLE].numpy().tobytes())
    begin = [_unpickle(archive, stream, way_out) for _ in range(2)]
    if begin != [_LEGACY_MAGIC, _LEGACY_VERSION]:
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or truncated: no zip archive, no magic number"
        )
    system = _unpickle(archive, stream, way_out)
    little = system.get("little_endian", True) if isinstance(system, dict) else True
    archive.swapped = bool(little) != (sys.byteorder == "little")
    storages: dict[str, _Storage] = {}
    result = _unpickle(archive, stream, way_out, storages)
    keys = _unpickle(archive, stream, way_out)
    at = stream.tell()
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in storages:
            raise CheckpointError(f"{path}: data of {shown(key)}, which nothing in it uses")
        count = int.from_bytes(raw[at : at + 8].numpy().tobytes(), "big" if not little else "little")
        size = count * storages[key].dtype.itemsize
        at += 8
        if at + size > len(raw):
            raise CheckpointError(
                f"{path}: not a PyTorch checkpoint, or truncated: {size:,} bytes of {shown(key)} from byte "
                f"{at:,} expected, the file has {len(raw):,}"
            )
        archive.places[key] = at, size
        at += size
    return result


def _unpickle(
    archive: _Archive, stream: io.BytesIO, way_out: str, storages: dict[str, _Storage] | None = None
) -> object:
    path = archive.path
    try:
        return _Unpickler(stream, _TORCH_NAMES, archive, storages).load()
    except _Refused as error:
        keep = (
            " If you trust it, keep what is needed: "
            f"c = torch.load({str(path)!r}, weights_only=False); torch.save({way_out}, 'clean.pt')"
        )
        raise CheckpointError(
            f"{path}: not a plain state dict, and opening it could run code: it names {error}.{keep}"
        ) from error
    # a damaged pickle fails in as many ways as it has operations
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or truncated: {first_line(error)}"
        ) from error


def _hashing(operation: Callable[[Any], None], hashed: slice) -> Callable[[Any], None]:
    """Wrap a pickle operation: its keys and members must be text or numbers.

    The hash of a tuple of tuples that each hold the one before twice takes for ever, that of a long integer
    as long as it is.
    """

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[hashed]:
            if not isinstance(key, str | bytes | float | None) and not _is_small(key):
                raise pickle.UnpicklingError(
                    f"keys of text or numbers are needed, {type(key).__name__} found"
                )
        operation(unpickler)

    return checked


def _is_small(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**64


class _Unpickler(pickle._Unpickler):
    """Python's own, not the one in C: that one allocates whatever a damaged memo index says."""

    def __init__(
        self,
        stream: io.BytesIO,
        names: dict[tuple[str, str], Any],
        archive: _Archive | None = None,
        storages: dict[str, _Storage] | None = None,
    ) -> None:
        super().__init__(stream, encoding="utf-8")
        self.names, self.archive = names, archive
        self.storages = {} if storages is None else storages

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        if self.archive is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a storage is needed")
        _, dtype, key, _, count = pid[:5]
        if not isinstance(key, str):
            raise pickle.UnpicklingError("a storage's key, text, is needed")
        if len(pid) > 5 and pid[5] is not None:
            return _Unsupported("a view of a storage")
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage's class is needed")
        storage = _Storage(self.archive, dtype, key, count)
        self.storages[key] = storage
        return storage

    def load_build(self) -> None:
        """An object's attributes: a state dict's _metadata, which nothing here needs."""
        self.stack.pop()  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        **{
            code[0]: _hashing(pickle._Unpickler.dispatch[code[0]], hashed)
            for code, hashed in (
                (pickle.SETITEM, slice(-2, -1)),
                (pickle.SETITEMS, slice(None, None, 2)),
                (pickle.DICT, slice(None, None, 2)),
                (pickle.ADDITEMS, slice(None)),
                (pickle.FROZENSET, slice(None)),
            )
        },
    }


def _tensor_v2(
    storage: object, offset: object, shape: object, stride: object, *rest: object
) -> _Tensor | _Unsupported:
    """Read a tensor. Of requires_grad, hooks and metadata the last alone, of conjugates, changes values."""
    if isinstance(storage, _Unsupported):
        return storage
    return _Tensor(storage, offset, shape, stride, metadata=rest[2] if len(rest) > 2 else None)


def _tensor_v3(
    storage: object, offset: object, shape: object, stride: object, *rest: object
) -> _Tensor | _Unsupported:
    """Read a tensor of a dtype that has no storages of its own: the dtype comes after the hooks."""
    if isinstance(storage, _Unsupported):
        return storage
    return _Tensor(storage, offset, shape, stride, rest[2], rest[3] if len(rest) > 3 else None)


def _parameter(tensor: object, *_: object) -> object:
    return tensor


def _unsupported(kind: str) -> Callable[..., _Unsupported]:
    return lambda *_: _Unsupported(kind)


# nothing is copied: a call takes a few bytes, and may be given the same large value again and again
def _size(values: tuple[object, ...] = ()) -> tuple[object, ...]:
    return values


def _dict() -> dict[object, object]:
    return {}


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_QUANTISED = {
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
_TORCH_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _dict,
    ("_codecs", "encode"): _Opaque,
    ("torch", "Size"): _size,
    ("torch", "device"): _Opaque,
    ("torch._utils", "_rebuild_tensor"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._utils", "_rebuild_qtensor"): _unsupported("a quantised one"),
    ("torch._utils", "_rebuild_sparse_tensor"): _unsupported("a sparse one"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _unsupported("a sparse one"),
    ("torch._utils", "_rebuild_nested_tensor"): _unsupported("a nested one"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unsupported("one without data"),
    ("torch._tensor", "_rebuild_from_type_v2"): _unsupported("one of a class of its own"),
    ("torch.serialization", "_get_layout"): _Opaque,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{(module, name): dtype for module in ("torch", "torch.cuda") for name, dtype in _STORAGES.items()},
    **{("torch", str(dtype)[6:]): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    **{("torch", name): dtype for name, dtype in _QUANTISED.items()},
    **{
        ("torch", f"per_{what}_affine{end}"): _Opaque
        for what in ("tensor", "channel")
        for end in ("", "_float_qparams")
    },
    **{(module, "set"): _Opaque for module in ("builtins", "__builtin__")},
    **{(module, "bytearray"): _Opaque for module in ("builtins", "__builtin__")},
    **{(module, "complex"): _Opaque for module in ("builtins", "__builtin__")},
    ("collections", "Counter"): _Opaque,
}
