"""The file of a pack: a header that says what it serves, and each kernel's machine code by what it is for.

::

    magic line, sha256 of the header, its length, header (JSON), kernels (xz)

A kernel is unpacked when it is first launched. The same launches, compiler and sources make the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptkern.durable import write_file

SUFFIX = ".pack"
_MAGIC = b"gptkern pack 1\n"
_NUMBER = 8  # bytes of a length
_DIGEST = hashlib.sha256().digest_size
_PRESET = 9 | lzma.PRESET_EXTREME


class PackError(ValueError):
    """A file that is no pack, or a damaged one."""


@dataclass(frozen=True)
class Made:
    """The circumstances in which a pack was made.

    Attributes:
        gptkern: The package's version.
        sources: Digest of the kernels' source files.
        triton, ptxas: Versions of the compilers.
        arch: The GPU's architecture (90 for sm_90).
    """

    gptkern: str
    sources: str
    triton: str
    ptxas: str
    arch: int


@dataclass(frozen=True)
class Binary:
    """Machine code and how it is launched.

    Attributes:
        key: What it was compiled for: the bytes of ``gptkern._C.PackedKernel.key``.
        image: The cubin.
        facts: Entry name, arguments and attributes, as ``gptkern._C.PackedKernel.add`` takes them.
    """

    key: bytes
    image: bytes
    facts: dict[str, Any]


def _packed(binaries: Iterable[Binary]) -> bytes:
    images: dict[bytes, int] = {}
    index = []
    for binary in sorted(binaries, key=lambda binary: (binary.image, binary.key)):
        image = images.setdefault(binary.image, len(images))
        index.append({"key": binary.key.hex(), "image": image, "facts": binary.facts})
    header = json.dumps(
        {"sizes": [len(image) for image in images], "binaries": index}, sort_keys=True
    ).encode()
    content = b"".join((len(header).to_bytes(_NUMBER, "little"), header, *images))
    return lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=_PRESET)


def _unpacked(data: bytes) -> list[Binary]:
    content = lzma.decompress(data, format=lzma.FORMAT_XZ)
    begin = _NUMBER + int.from_bytes(content[:_NUMBER], "little")
    header = json.loads(content[_NUMBER:begin])
    images = []
    for size in header["sizes"]:
        images.append(content[begin : begin + size])
        begin += size
    return [
        Binary(bytes.fromhex(entry["key"]), images[entry["image"]], entry["facts"])
        for entry in header["binaries"]
    ]


def write(path: Path, made: Made, kernels: dict[str, list[Binary]]) -> None:
    """Write a pack, whole or not at all.

    Args:
        kernels: Machine code by the kernel's name (``module:function``).
    """
    bodies = {name: _packed(binaries) for name, binaries in sorted(kernels.items())}
    entries, begin = {}, 0
    for name, body in bodies.items():
        entries[name] = {
            "begin": begin,
            "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
            "count": len(kernels[name]),
        }
        begin += len(body)
    header = json.dumps({"made": asdict(made), "kernels": entries}, sort_keys=True).encode()
    length = len(header).to_bytes(_NUMBER, "little")
    write_file(path, b"".join((_MAGIC, hashlib.sha256(header).digest(), length, header, *bodies.values())))


class Pack:
    """An opened pack. Its header is read, its kernels are not.

    Attributes:
        path: The file.
        made: The circumstances in which it was made.
        counts: Number of binaries by the kernel's name.

    Raises:
        PackError: The file is no pack, or its header is damaged.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise PackError(f"{path} is no pack of this version")
            digest = file.read(_DIGEST)
            length = int.from_bytes(file.read(_NUMBER), "little")
            header = file.read(min(length, path.stat().st_size))
            self._begin = file.tell()
        if hashlib.sha256(header).digest() != digest:
            raise PackError(f"{path} is damaged: its header does not match its checksum")
        try:
            told = json.loads(header)
            self.made = Made(**told["made"])
            self._entries: dict[str, dict[str, Any]] = told["kernels"]
            self.counts = {name: int(entry["count"]) for name, entry in self._entries.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PackError(f"{path} is no pack of this version: its header has other entries") from error

    def read(self, kernel: str) -> list[Binary]:
        """The binaries of a kernel; none if the pack lacks it.

        Raises:
            PackError: They are damaged.
        """
        return _unpacked(self._body(kernel)) if kernel in self._entries else []

    def check(self) -> None:
        """Read all kernels without unpacking them.

        Raises:
            PackError: One is damaged.
        """
        for kernel in self._entries:
            self._body(kernel)

    def _body(self, kernel: str) -> bytes:
        entry = self._entries[kernel]
        with self.path.open("rb") as file:
            file.seek(self._begin + entry["begin"])
            body = file.read(entry["bytes"])
        if hashlib.sha256(body).hexdigest() != entry["sha256"]:
            raise PackError(f"{self.path} is damaged: {kernel} does not match its checksum")
        return body
