"""Compiling launches for a pack."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas

from gptkern.ops import _aot, _launch
from gptkern.ops.pack import signature
from gptkern.ops.pack.bare import Sent, received, sent
from gptkern.ops.pack.file import Binary, Made

_FORMS = {
    **dict.fromkeys(("i1", "i8", "u1", "u8"), "i8"),
    **dict.fromkeys(("i32", "u32"), "i32"),
    **dict.fromkeys(("i64", "u64"), "i64"),
    **dict.fromkeys(("fp32", "f32"), "f32"),
}
# Element types of tensor maps as the driver numbers them, where the compiler's number is another.
_MAP_TYPES = {8: 10, 9: 8, 10: 9}
_PARAMETER = re.compile(r"\.param\b")
_THREADS = re.compile(r"\.reqntid\s+(\d+)")


class Unpackable(ValueError):
    """A launch whose machine code needs more than a pack's launcher gives."""


@contextmanager
def _without_paths() -> Iterator[None]:
    """Compile without line numbers: they hold this machine's paths, and make packs larger."""
    name = "TRITON_DISABLE_LINE_INFO"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@cache
def _ptxas(arch: int) -> str:
    """Version of the assembler that Triton takes for ``arch``."""
    command = [get_ptxas(arch).path, "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise RuntimeError(f"ptxas says no version:\n{text}")
    return found.group(1)


def driver_for(ptxas: str, arch: int) -> str:
    """The oldest driver that takes an assembler's code: of the same CUDA major version, and knows the GPU."""
    major = int(ptxas.partition(".")[0])
    if major > 13:
        return f"a driver that serves CUDA {major}.0"
    if major == 13:
        number, cuda = 580, "13.0"
    elif arch in (100, 101, 120):
        number, cuda = 570, "12.8"
    else:
        number, cuda = (525, "12.0") if arch <= 90 else (575, "12.9")
    return f"NVIDIA's driver {number} (CUDA {cuda}) or newer"


def made(arch: int) -> Made:
    """The circumstances here and now."""
    return Made(version("gptkern"), signature.sources(), triton.__version__, _ptxas(arch), arch)


def _map(meta: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    if (
        meta["fp4_padded"]
        or meta.get("is_im2col")
        or descriptor.padding != "zero"
        or descriptor.round_f32_to_tf32
    ):
        raise Unpackable(f"a tensor map of another kind than tiles padded by zeros: {meta}")
    return {
        "swizzle": meta["swizzle"],
        "element_bytes": meta["elem_size"],
        "element_type": _MAP_TYPES.get(meta["elem_type"], meta["elem_type"]),
        "box": list(meta["block_size"]),
    }


def _arguments(compiled: Any, launch: _launch.Launch) -> tuple[list[list[Any]], list[dict[str, Any]], int]:
    """The arguments passed, the layouts of tensor maps, and the number of parameters in machine code."""
    passed: list[list[Any]] = []
    maps: list[dict[str, Any]] = []
    metas = list(compiled.metadata.tensordesc_meta or ())
    parameters = 0
    for slot, kind in enumerate(compiled.src.signature.values()):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            if len(maps) == len(metas):
                raise Unpackable("a tensor descriptor for an architecture without tensor maps")
            maps.append(_map(metas[len(maps)], launch.args[slot]))
            passed.append([slot, "map"])
            parameters += 1 + 2 * len(maps[-1]["box"])
        else:
            form = "pointer" if kind.startswith("*") else _FORMS.get(kind)
            if form is None:
                raise Unpackable(f"an argument of type {kind}")
            passed.append([slot, form])
            parameters += 1
    return passed, maps, parameters


def binary(launch: _launch.Launch, arch: int) -> Binary:
    """The machine code of a launch.

    Raises:
        Unpackable: It needs memory of its own, or takes an argument that a pack cannot pass.
    """
    compiled = _aot.compile_launch(launch, arch)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise Unpackable(f"{launch.name} asks for memory of its own at launch")
    ptx = compiled.asm["ptx"]
    header = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    threads = _THREADS.search(header)
    passed, maps, parameters = _arguments(compiled, launch)
    facts = {
        "entry": metadata.name,
        "needs": f"sm_{arch}, by ptxas {_ptxas(arch)}, for {driver_for(_ptxas(arch), arch)}",
        "passed": passed,
        "maps": maps,
        "threads": int(threads.group(1)) if threads else 32 * metadata.num_warps,
        "shared": metadata.shared,
        "blocks_per_cluster": metadata.num_ctas,
        "dependent": bool(metadata.launch_pdl),
        "cooperative": bool(metadata.launch_cooperative_grid),
        "scratch": len(_PARAMETER.findall(header)) - parameters,
    }
    key = signature.empty(launch.kernel).key(launch.args, launch.kwargs)
    return Binary(key, compiled.asm["cubin"], facts)


def _binary_here(parts: Sent, arch: int) -> Binary:
    return binary(received(parts), arch)


def unique(launches: Iterable[_launch.Launch]) -> list[_launch.Launch]:
    """One launch for each different key of each kernel."""
    kernels: dict[str, Any] = {}
    found: dict[tuple[str, bytes], _launch.Launch] = {}
    for launch in launches:
        name = signature.name_of(launch.kernel)
        if name not in kernels:
            kernels[name] = signature.empty(launch.kernel)
        found.setdefault((name, kernels[name].key(launch.args, launch.kwargs)), launch)
    return list(found.values())


def binaries(
    launches: Iterable[_launch.Launch],
    arch: int,
    processes: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, list[Binary]]:
    """The machine code of launches with different keys, by kernel.

    What was compiled lies in Triton's cache at once: after an interruption the same call goes on from there.

    Args:
        processes: Number of processes that compile.
        advance: Called with 1 after each launch.
    """
    found: dict[str, list[Binary]] = {}
    with _without_paths(), ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_binary_here, sent(launch), arch): launch for launch in launches}
        try:
            for done in as_completed(waiting):
                found.setdefault(signature.name_of(waiting[done].kernel), []).append(done.result())
                advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found
