"""Compiles recorded launches for a GPU that is not here, with this interpreter's Triton, without PyTorch.

    python benchmarks/gpu/precompile.py LAUNCHES.jsonl [--arch 90] [--launchers] [--part 0/2] [--used FILE]

Machine code goes to Triton's cache (``TRITON_CACHE_DIR``), by the path that a real launch takes, so that one
with the same Triton finds it there. ``--launchers``: also the small C modules that Triton 3.6 builds to call
a kernel, and its driver's. The last line says how many kernels were compiled, how many were found, and how
many launches repeat another's kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class _Anything(ModuleType):
    """A module that has whatever name is asked of it: a class without contents."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (), {})
        setattr(self, name, found)
        return found


class KernelsAlone(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports device code without what surrounds it.

    Packages of gptkern have no contents but their modules, and PyTorch is a name: kernels need neither.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Packages of gptkern as bare folders, PyTorch's modules as modules that hold anything."""
        top = name.partition(".")[0]
        if top == "torch":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        folder = ROOT.joinpath(*name.split("."))
        if top != "gptkern" or not folder.is_dir():
            return None
        bare = importlib.machinery.ModuleSpec(name, None, is_package=True)
        bare.submodule_search_locations = [str(folder)]
        return bare

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """An empty PyTorch module."""
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to execute."""


sys.meta_path.insert(0, KernelsAlone())
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import triton  # noqa: E402
from compilations import counting, triton_key  # noqa: E402
from launches import Recorded, lines, read  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.cache import FileCacheManager  # noqa: E402

counted: Counter[str] = Counter()
used: set[str] = set()


class Cache(FileCacheManager):
    """Triton's cache of files, which keeps account of what is asked of it and what is new."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        super().__init__(key, override, dump)
        used.add(key)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        """As the base class; counted."""
        counted["written"] += 1
        return str(super().put(data, filename, binary))


class Target:
    """The little of a Triton driver that compiling asks for."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        """The GPU that code is for."""
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def compiled(launch: Recorded) -> Any:
    """Triton's compiled kernel, from the cache where it is there."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    return kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)


@contextlib.contextmanager
def libcuda() -> Any:
    """A library of that name, without contents, to link and to load modules with where there is no driver."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        source = library.with_suffix(".c")
        source.write_text("int no_driver;\n")
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        before = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)  # its functions are looked up when they are called
        try:
            yield
        finally:
            sys.setdlopenflags(before)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("launches", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="compute capability (default: 90)")
    parser.add_argument("--launchers", action="store_true", help="the C modules that call kernels, too")
    parser.add_argument("--part", default="0/1", help="every how manieth launch, from which one on")
    parser.add_argument("--used", type=Path, help="write the cache's keys that were asked for to this file")
    asked = parser.parse_args()
    first, every = map(int, asked.part.split("/"))

    triton.knobs.cache.manager_class = Cache
    triton.runtime.driver.set_active(Target(asked.arch))
    with counting(counted), libcuda() if asked.launchers else contextlib.nullcontext():
        _all(lines([asked.launches])[first::every], asked.launchers)
    if asked.used:
        asked.used.write_text(json.dumps(sorted(used)))
    print(json.dumps({"triton": triton.__version__, "triton_key": triton_key(), **counted}), flush=True)
    return int(bool(counted["failed"]))


def _all(texts: Sequence[str], launchers: bool) -> None:
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    if launchers:
        CudaUtils()
    for index, text in enumerate(texts):
        counted["launches"] += 1
        before = counted["compiled"] + counted["found"]
        try:
            kernel = compiled(read(text))
            # Lines that differ in what no machine code depends on.
            counted["repeated"] += before == counted["compiled"] + counted["found"]
            if launchers:
                CudaLauncher(kernel.src, kernel.metadata)
        # Whatever a compiler raises: the others are worth having.
        except Exception as error:
            counted["failed"] += 1
            print(f"FAILED {text}\n    {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if index % 50 == 49:
            print(f"{index + 1} of {len(texts)}: {dict(counted)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
