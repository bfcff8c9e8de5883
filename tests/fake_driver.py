"""A stand-in for NVIDIA's driver that keeps what it is asked to launch."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cubins import entries, image_at, parameter_sizes

_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
_LOAD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_SET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint32 * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint32),
    )


@dataclass
class Launched:
    """One launch: ``kernel`` is the address of the image that was loaded."""

    kernel: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int | None
    attributes: dict[int, list[int]]
    parameters: list[bytes]


def build(folder: Path) -> Path:
    """The library, compiled in ``folder``."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("fake_driver.c")
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(source)], check=True)
    return library


class FakeDriver:
    """The library, loaded where ``dlopen("libcuda.so.1")`` finds it: for one process, from then on."""

    def __init__(self, library: Path) -> None:
        self.launched: list[Launched] = []
        self.loaded: list[str] = []
        self.set: list[tuple[int, int, int, int]] = []
        self.result = 0
        self._sizes: dict[int, list[int]] = {}
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._held = (_LAUNCH(self._launch), _LOAD(self._load), _SET(self._set))
        self._library.fake_set(*self._held)

    def version(self, number: int) -> None:
        """What ``cuDriverGetVersion`` says."""
        self._library.fake_version(number)

    @property
    def encoded(self) -> int:
        """Tensor maps that were made."""
        return int(self._library.fake_encoded())

    def silence(self) -> None:
        """Keep nothing from now on, at no cost."""
        self._library.fake_set(None, None, None)

    def _launch(self, config: int, kernel: int, parameters: ctypes._Pointer[ctypes.c_void_p]) -> int:
        told = _Config.from_address(config)
        self.launched.append(
            Launched(
                kernel,
                tuple(told.grid),
                tuple(told.block),
                told.shared,
                told.stream,
                {told.attributes[i].id: list(told.attributes[i].value)[:3] for i in range(told.count)},
                [ctypes.string_at(parameters[i], size) for i, size in enumerate(self._sizes[kernel])],
            )
        )
        return self.result

    def _load(self, image: int) -> int:
        cubin = image_at(image)
        (entry,) = entries(cubin)
        self.loaded.append(entry)
        self._sizes[image] = parameter_sizes(cubin, entry)
        return self.result

    def _set(self, attribute: int, value: int, kernel: int, device: int) -> int:
        self.set.append((attribute, value, kernel, device))
        return self.result
