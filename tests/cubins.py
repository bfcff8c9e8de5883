"""What a cubin says of its kernels: the sizes of their parameters."""

from __future__ import annotations

import ctypes
import struct

_PARAMETER = 0x17  # EIATTR_KPARAM_INFO
_WITH_SIZE = 4  # EIFMT_SVAL


def sections(cubin: bytes) -> dict[str, bytes]:
    """A 64-bit little-endian ELF file's sections by name."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    found = [struct.unpack_from("<IIQQQQ", cubin, headers + index * size) for index in range(count)]
    names = found[names_index][4]
    return {
        cubin[names + name : cubin.index(b"\0", names + name)].decode(): cubin[begin : begin + length]
        for name, _, _, _, begin, length in found
    }


def parameter_sizes(cubin: bytes, entry: str) -> list[int]:
    """Bytes of each parameter of a kernel, in order."""
    info, at, sizes = sections(cubin)[f".nv.info.{entry}"], 0, {}
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _WITH_SIZE:
            if attribute == _PARAMETER:
                _, ordinal, _, flags = struct.unpack_from("<IHHI", info, at)
                sizes[ordinal] = flags >> 18
            at += size
    return [sizes[ordinal] for ordinal in range(len(sizes))]


def image_at(address: int) -> bytes:
    """The ELF file in memory, as long as its own tables say."""
    head = ctypes.string_at(address, 0x40)
    programs, headers = struct.unpack_from("<QQ", head, 0x20)
    program_size, program_count, size, count = struct.unpack_from("<HHHH", head, 0x36)
    return ctypes.string_at(address, max(headers + size * count, programs + program_size * program_count))


def entries(cubin: bytes) -> list[str]:
    """Names of the kernels."""
    start = ".nv.info."
    return [name.removeprefix(start) for name in sections(cubin) if name.startswith(start)]
