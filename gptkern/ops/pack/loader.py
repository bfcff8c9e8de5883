"""The packs of this process: which are there, which serve a GPU, and what was launched from them.

Files come from ``GPTKERN_PACK`` (files or folders, separated as in ``PATH``; empty: none), otherwise from the
package's own folder ``gptkern/ops/pack/files``. A pack of other sources, of another Triton than the installed
one, or a damaged one, is passed over with a warning, as its code might round otherwise than what Triton
compiles beside it; under ``GPTKERN_STRICT=1`` that is an error, and so is every launch that Triton would
compile, with packs and without.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gptkern import _native
from gptkern.environment import fallback, strict
from gptkern.ops.pack import signature
from gptkern.ops.pack.file import SUFFIX, Made, Pack, PackError

VARIABLE = "GPTKERN_PACK"
OWN = Path(__file__).parent / "files"
_COMPILED = "code that Triton compiles"


def files() -> list[Path]:
    """The packs' files, whatever they hold.

    Raises:
        FileNotFoundError: ``GPTKERN_PACK`` names what is not there, or a folder without a pack.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        return sorted(OWN.glob(f"*{SUFFIX}"))
    found: list[Path] = []
    # absolute: the process may go to another folder before it unpacks a kernel
    for place in [Path(part).absolute() for part in named.split(os.pathsep) if part]:
        if not place.exists():
            raise FileNotFoundError(f"{VARIABLE}: there is no file or folder {place}")
        within = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else [place]
        if not within:
            raise FileNotFoundError(f"{VARIABLE}: the folder {place} holds no file *{SUFFIX}")
        found += within
    return found


def reason_against(made: Made) -> str | None:
    """The reason why a pack is of no use to this package and its Triton; None: it may be used."""
    if made.sources != signature.sources():
        return f"it was made from the kernels of another gptkern ({made.gptkern})"
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return None
    if made.triton != installed:
        return f"it was made by Triton {made.triton}, and {installed} is installed"
    return None


def serves(pack_arch: int, device_arch: int) -> bool:
    """True if code for ``pack_arch`` runs on a GPU of ``device_arch``.

    From sm_90 on it is made for one architecture alone; earlier code runs on all of its generation.
    """
    return pack_arch == device_arch or (pack_arch < 90 and pack_arch <= device_arch < 90)


class Loader:
    """The packs' kernels, unpacked as they are launched.

    Attributes:
        packs: The packs in use, in the order in which they are asked.
        compiled: Calls that no pack held, by kernel.
    """

    def __init__(self) -> None:
        self.packs = list(self._usable())
        self.compiled: Counter[str] = Counter()
        self._kernels: dict[tuple[str, int], Any] = {}
        self._launcher = None
        if self.packs:
            self._launcher = _native.extension.Launcher(self._resolve, _current_stream)

    def _usable(self) -> Iterator[Pack]:
        if _native.extension is None:
            return
        for path in files():
            try:
                pack = Pack(path)
                reason = reason_against(pack.made)
            except (PackError, OSError) as error:
                fallback(f"the pack {path}", _COMPILED, str(error))
                continue
            if reason is None:
                yield pack
            else:
                fallback(f"the pack {path}", _COMPILED, reason)

    def kernel(self, kernel: Any, arch: int) -> Any:
        """The ``gptkern._C.PackedKernel`` of a kernel for ``arch``; None if no pack serves such a GPU."""
        name = signature.name_of(kernel)
        if (name, arch) not in self._kernels:
            packs = [pack for pack in self.packs if serves(pack.made.arch, arch)]
            self._kernels[name, arch] = self._unpacked(kernel, name, packs) if packs else None
        return self._kernels[name, arch]

    def _unpacked(self, kernel: Any, name: str, packs: list[Pack]) -> Any:
        packed = signature.empty(kernel)
        for pack in reversed(packs):  # the first pack's code is added last, and stays
            try:
                for binary in pack.read(name):
                    packed.add(binary.key, binary.image, binary.facts)
            except (PackError, OSError) as error:
                fallback(f"{name}", _COMPILED, str(error))
        return packed

    def _resolve(self, kernel: Any, device: int) -> Any:
        major, minor = torch.cuda.get_device_capability(device)
        return self.kernel(kernel, 10 * major + minor)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Launch machine code of a pack on the tensors' GPU and its current stream; False if none holds it.

        Raises:
            RuntimeError: The driver refuses, or Triton would compile the kernel under ``GPTKERN_STRICT=1``.
        """
        if self._launcher is not None and self._launcher.launch(kernel, grid, args, kwargs):
            return True
        if self.packs or strict():
            self._miss(kernel)
        return False

    def _miss(self, kernel: Any) -> None:
        """Note that Triton compiles a kernel: with packs in use a warning, in strict mode an error."""
        if _interpreted(kernel):
            return
        name = signature.name_of(kernel)
        self.compiled[name] += 1
        part, reason = self._lack(name)
        if strict():
            raise RuntimeError(
                f"gptkern: Triton would compile {name}: {reason} (GPTKERN_STRICT=1 makes this an error). "
                f"Name a pack that holds it in {VARIABLE}, which gptkern pack makes without a GPU, or unset "
                "GPTKERN_STRICT"
            )
        fallback(part, _COMPILED, reason)

    def _lack(self, name: str) -> tuple[str, str]:
        """The part that has no machine code, and the reason."""
        if _native.extension is None:
            return name, "gptkern._C, which launches packs, cannot be loaded"
        if not self.packs:
            return name, "no pack is in use"
        unserved = [arch for (held, arch), packed in self._kernels.items() if held == name and packed is None]
        if unserved:
            archs = ", ".join(sorted({f"sm_{pack.made.arch}" for pack in self.packs}))
            return f"a GPU of sm_{unserved[0]}", f"the packs in use are for {archs}, not for sm_{unserved[0]}"
        return name, "no pack in use holds it for these types and sizes"


def _interpreted(kernel: Any) -> bool:
    """True for a kernel that Triton's interpreter runs. Triton itself may be missing."""
    return type(kernel).__module__ == "triton.runtime.interpreter"


def _current_stream(device: int) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device))


@cache
def loader() -> Loader:
    """The process's loader, made at the first launch."""
    return Loader()
