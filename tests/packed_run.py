"""Launches from a pack on a stand-in driver, in a process in which Triton cannot be imported.

    python tests/packed_run.py LIBRARY ARCH PART...

The parts that ``packed_model.launches`` knows, and ``generate`` of a small model: each launch must reach the
driver with the right grid, attributes and argument bytes. Prints a line of JSON: launches, kernels, and the
errors.
"""

from __future__ import annotations

import copy
import inspect
import json
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class NoTriton(MetaPathFinder):
    """Refuses every import of Triton."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """An error for Triton, nothing for others."""
        if name.partition(".")[0] == "triton":
            raise ImportError("this process has no Triton")


sys.meta_path.insert(0, NoTriton())
sys.path.insert(0, str(Path(__file__).parent))

from fake_driver import FakeDriver
from packed_model import launches, model

from gptkern import packing
from gptkern.ops._launch import Launch
from gptkern.ops.pack.bare import Pointer
from gptkern.ops.pack.loader import Loader, loader

STREAM, DEVICE = 0x5EAD, 3
NO_BINARY = 209
# Of a tensor map's numbers: the address, sizes, strides, sizes of a box, and steps.
MAP = ((0, 1), (1, 6), (6, 10), (10, 15), (15, 20))
OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "launch_cooperative_grid"}


def expected(launch: Launch) -> list[bytes | None]:
    """The arguments as machine code reads them; None for a tensor map. Worked out from the source alone."""
    kernel, bound = launch.kernel, inspect.signature(launch.kernel.fn).bind
    options = {name for name in launch.kwargs if name in OPTIONS}
    call = bound(*launch.args, **{name: v for name, v in launch.kwargs.items() if name not in options})
    call.apply_defaults()
    out: list[bytes | None] = []
    for name, parameter in call.signature.parameters.items():
        value = call.arguments[name]
        if "constexpr" in str(parameter.annotation) or value is None:
            continue
        if hasattr(value, "block_shape"):
            out.append(None)
            out += [struct.pack("<i", size) for size in value.shape]
            out += [struct.pack("<q", step) for step in value.strides]
        elif hasattr(value, "data_ptr"):
            out.append(struct.pack("<Q", value.data_ptr()))
        elif isinstance(value, float):
            out.append(struct.pack("<f", value))
        elif value == 1 and not isinstance(value, bool) and name not in kernel.do_not_specialize:
            continue
        else:
            wide = not -(1 << 31) <= value < 1 << 31
            out.append(struct.pack("<q" if wide else "<b" if isinstance(value, bool) else "<i", value))
    return out


def faults(launch: Launch, driver: FakeDriver, arch: int) -> Iterator[str]:
    """What is wrong with what the driver was asked for."""
    packed = loader().kernel(launch.kernel, arch)
    before = len(driver.launched)
    if not packed.launch(launch.grid, launch.args, launch.kwargs, DEVICE, STREAM):
        try:
            loader()._miss(launch.kernel)
        except RuntimeError as error:  # GPTKERN_STRICT=1
            yield str(error)
        else:
            yield "the pack lacks it"
        return
    if len(driver.launched) != before + 1:
        yield f"launched {len(driver.launched) - before} times"
        return
    seen = driver.launched.pop()
    if seen.grid != (*launch.grid, *(1,) * (3 - len(launch.grid))):
        yield f"grid {seen.grid}, not {launch.grid}"
    if (
        seen.block[0] % 32
        or seen.block[0] < 32 * launch.kwargs.get("num_warps", 4)
        or seen.block[1:] != (1, 1)
    ):
        yield f"block {seen.block}"
    if seen.stream != STREAM:
        yield f"stream {seen.stream}"
    attributes = {6: "launch_pdl", 2: "launch_cooperative_grid"}
    wanted = {number for number, name in attributes.items() if launch.kwargs.get(name)}
    if set(seen.attributes) != wanted or any(values[0] != 1 for values in seen.attributes.values()):
        yield f"attributes {seen.attributes}, not {wanted}"
    arguments = expected(launch)
    if any(seen.parameters[i] != told for i, told in enumerate(arguments) if told is not None):
        yield f"parameters {seen.parameters}, not {arguments}"
    if any(seen.parameters[len(arguments) :]) and any(map(any, seen.parameters[len(arguments) :])):
        yield "scratch memory is not null"
    maps = [value for value in launch.args if hasattr(value, "block_shape")]
    found = [seen.parameters[i] for i, told in enumerate(arguments) if told is None]
    for value, told in zip(maps, found, strict=True):
        yield from map_faults(value, told)


def map_faults(descriptor: Any, told: bytes) -> Iterator[str]:
    """What is wrong with a tensor map, as the stand-in writes it: the innermost dimension is first."""
    numbers = struct.unpack_from("<10Q5I11B", told)
    address, shape, strides, box, steps = (numbers[slice(*ends)] for ends in MAP)
    kind, rank, interleave, swizzle, promotion, fill = numbers[20:]
    size = descriptor.base.dtype.itemsize
    sizes, distances = descriptor.shape[::-1], [size * step for step in descriptor.strides[-2::-1]]
    if (*address, rank, *shape[:rank]) != (descriptor.base.data_ptr(), len(sizes), *sizes):
        yield f"a tensor map of {numbers}"
    if list(strides[: rank - 1]) != distances or any(strides[rank - 1 :]):
        yield f"a tensor map with strides {strides}, not {distances}"
    # The compiler may cut a tile into boxes of one swizzle's width.
    tile = descriptor.block_shape[::-1]
    if any(whole % part for whole, part in zip(tile, box, strict=False)) or any(box[rank:]):
        yield f"boxes {box} of tiles {tile}"
    # Rows of 32, 64 or 128 bytes are swizzled as the matrix unit reads them: CUDA's 1, 2 and 3.
    if swizzle and box[0] * size > 16 << swizzle:
        yield f"boxes of {box[0] * size} bytes in swizzle {swizzle}"
    types = {2: 9 if "bfloat16" in str(descriptor.base.dtype) else 6, 4: 7}
    if (kind, steps[:rank], interleave, promotion, fill) != (types[size], (1,) * rank, 0, 2, 0):
        yield f"a tensor map of type {kind}, steps {steps}, fill {fill}"


def maps_again(driver: FakeDriver, launch: Launch, arch: int) -> Iterator[str]:
    """What is wrong with tensor maps of launches that differ in a matrix's place, sizes or steps alone."""

    def moved(base: Pointer, bytes_on: int) -> Pointer:
        return Pointer(base.dtype, base.address + bytes_on)

    def changed(**changes: Any) -> Launch:
        first = copy.copy(launch.args[0])
        vars(first).update(changes)
        return replace(launch, args=(first, *launch.args[1:]))

    first = launch.args[0]
    (rows, *sizes), (step, *steps) = first.shape, first.strides
    others = [changed(base=moved(first.base, 4096)), changed(shape=[rows + 1, *sizes])]
    others.append(changed(strides=[step + 64, *steps]))
    yield from faults(launch, driver, arch)
    for made, wanted in [(launch, 0), *((other, 1) for other in others), (launch, 0), (others[0], 0)]:
        before = driver.encoded
        yield from faults(made, driver, arch)
        if driver.encoded != before + wanted:
            yield f"{driver.encoded - before} tensor maps were made, not {wanted}"
    for place in range(1, 2000):  # more than are kept
        yield from faults(changed(base=moved(first.base, 16 * place)), driver, arch)
    yield from faults(launch, driver, arch)


def refusal(driver: FakeDriver, launch: Launch, arch: int) -> str:
    """What is said where an older driver does not take the machine code of a loader that starts anew."""
    driver.result = NO_BINARY
    driver.version(12040)
    try:
        Loader().kernel(launch.kernel, arch).launch(launch.grid, launch.args, launch.kwargs, DEVICE, STREAM)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def main() -> None:
    """The command."""
    library, arch, *parts = sys.argv[1:]
    driver = FakeDriver(Path(library))

    kernels: Counter[str] = Counter()
    errors: list[str] = []

    for where, launch in launches(int(arch), parts):
        kernels[launch.name] += 1
        errors.extend(f"{where}: {launch.name}: {fault}" for fault in faults(launch, driver, int(arch)))
    mapped = next(
        (launch for _, launch in launches(int(arch), parts) if hasattr(launch.args[0], "block_shape")), None
    )
    if mapped is not None:
        errors.extend(f"again: {fault}" for fault in maps_again(driver, mapped, int(arch)))
    told = {
        "mapped": mapped is not None,
        "kernels": kernels,
        "loaded": len(driver.loaded),
        "wrong": len(errors),
        "errors": errors[:20],
    }
    told["refused"] = refusal(driver, next(packing.model_launches(model(), int(arch))), int(arch))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
