"""One launch: parameters, blocks, and the order in which they go on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gptkern.testing.ptx.block import Block
from gptkern.testing.ptx.cluster import Cluster
from gptkern.testing.ptx.counters import Counters
from gptkern.testing.ptx.dependent import Stream
from gptkern.testing.ptx.hopper import TensorMap
from gptkern.testing.ptx.machine import Machine
from gptkern.testing.ptx.memory import Fault, Global
from gptkern.testing.ptx.operands import PARAMETER_MEMORY
from gptkern.testing.ptx.parse import Program, parse

# Rounds a block in which nobody ends or writes: whoever waits then waits for ever.
_IDLE_ROUNDS = 200
_reachable: list[torch.Tensor] = []


@contextmanager
def reachable(*tensors: torch.Tensor) -> Iterator[None]:
    """Tensors that launches within the block may use although they are no arguments.

    A kernel finds them by addresses in memory: a grouped product, by an argument that holds each matrix's
    ``data_ptr()``. An access to a tensor that is neither an argument nor named here is out of bounds.
    """
    _reachable.extend(tensors)
    try:
        yield
    finally:
        del _reachable[len(_reachable) - len(tensors) :]


def _parameter_bytes(program: Program, values: Sequence[Any]) -> np.ndarray[Any, Any]:
    last = program.parameters[-1] if program.parameters else None
    out = np.zeros(last.offset + last.size if last else 0, np.uint8)
    if len(values) > len(program.parameters):
        raise ValueError(f"{program.name} takes {len(program.parameters)} parameters; got {len(values)}")
    for parameter, value in zip(program.parameters, values, strict=False):
        place = out[parameter.offset : parameter.offset + parameter.size]
        if isinstance(value, TensorMap):
            continue
        if isinstance(value, bytes) and len(value) > parameter.size:
            raise ValueError(f"{parameter.name} has {parameter.size} bytes; got {len(value)}")
        if isinstance(value, torch.Tensor):
            place.view(np.uint64)[0] = value.data_ptr()
        elif isinstance(value, bytes):
            place[: len(value)] = np.frombuffer(value, np.uint8)
        elif isinstance(value, float):
            place.view({4: np.float32, 8: np.float64}[parameter.size])[0] = value
        else:
            bits = int(value) & ((1 << 8 * parameter.size) - 1)
            place[:] = np.frombuffer(bits.to_bytes(parameter.size, "little"), np.uint8)
    return out


def _places(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                yield x, y, z


def execute(
    ptx: str,
    grid: tuple[int, ...],
    values: Sequence[Any],
    *,
    names: Sequence[str] = (),
    entry: str = "",
    shared_bytes: int = 0,
    threads: int | None = None,
    cluster: tuple[int, int, int] | None = None,
    fresh: Sequence[torch.Tensor] = (),
    also: Sequence[torch.Tensor] = (),
    seed: int = 0,
    resident: int | None = None,
    stream: Stream | None = None,
    dependent: bool = False,
    fenced_barriers: bool = True,
    counters: Counters | None = None,
) -> None:
    """Run a kernel's PTX on CPU tensors, which it changes in place.

    Args:
        ptx: A module.
        grid: Blocks along x, y, z.
        values: The parameters in their order: CPU tensors, tensor maps, integers, floats, and the bytes of
            structures; zero if missing.
        names: Of the parameters, for messages.
        entry: A part of the kernel's name, where the module has several.
        shared_bytes: Dynamic shared memory of a block.
        threads: Threads of a block; by default what the module requires, or the most it allows.
        cluster: Blocks of a cluster along x, y, z; by default what the module requires.
        fresh: Tensors that nobody has written yet: reading a byte before it is written is a fault.
        also: Tensors that are reached through addresses in memory, as those of ``reachable``.
        seed: Chooses which block goes on wherever one may be held up, and which warps of a block where they
            have parted; with 0 warps that are behind go on.
        resident: Most blocks at a time; by default all, as in a cooperative launch.
        stream: The launches before, to which this one is added.
        dependent: The launch may begin before the ones before have ended, up to ``griddepcontrol.wait``.
        fenced_barriers: Ask for a fence between the making of a barrier and its first use by the copy engine.
        counters: Where to count what is executed.

    Raises:
        Fault: A check failed: its message names the instruction and its source line.
        NotImplementedError: The module has an instruction that is not served.
        ValueError: The module has no such entry, or a size does not fit it.
    """
    program = parse(ptx, entry)
    machine = Machine(program, fenced_barriers)
    sizes: tuple[int, int, int] = (*grid, *(1,) * (3 - len(grid)))  # type: ignore[assignment]
    shape = cluster or program.cluster
    count = sizes[0] * sizes[1] * sizes[2]
    if any(whole % part for whole, part in zip(sizes, shape, strict=True)):
        raise ValueError(f"execute: clusters of {shape} blocks do not divide a grid of {sizes}")
    maps = {
        PARAMETER_MEMORY + parameter.offset: value
        for parameter, value in zip(program.parameters, values, strict=False)
        if isinstance(value, TensorMap)
    }
    bare = [value.base if isinstance(value, TensorMap) else value for value in values]
    called = [*names, *(f"parameter {i}" for i in range(len(names), len(values)))]
    tensors = {
        name: value for name, value in zip(called, bare, strict=True) if isinstance(value, torch.Tensor)
    }
    tensors |= {f"tensor {i}": tensor for i, tensor in enumerate([*also, *_reachable])}
    unwritten = {name for name, tensor in tensors.items() if any(tensor is other for other in fresh)}
    before = stream.before(dependent) if stream is not None else []
    memory = Global(tensors, unwritten, count, before)
    parameters = _parameter_bytes(program, values)
    room = program.static_bytes + shared_bytes
    size = threads or program.threads
    clusters: dict[tuple[int, ...], Cluster] = {}
    for number, place in enumerate(_places(sizes)):
        corner = tuple(at // part for at, part in zip(place, shape, strict=True))
        if corner not in clusters:
            clusters[corner] = Cluster(shape, size, memory)
        block = Block(
            number, place, sizes, size, machine.steps, machine.order, program.width, parameters, memory,
            clusters[corner], room, maps, counters,
        )  # fmt: skip
        block.choose = random.Random(f"{seed} {number}") if seed else None
    _run(list(clusters.values()), machine, random.Random(seed), resident or count)
    if counters is not None:
        counters.ended(memory.uses(program.name))
    if stream is not None:
        blocks = [block for cluster in clusters.values() for block in cluster.members]
        early = dependent and all(block.began_dependents_early for block in blocks)
        stream.ended(memory.uses(program.name), early)


def _run(clusters: list[Cluster], machine: Machine, choose: random.Random, resident: int) -> None:
    """Let blocks go on in a random order, each until it may be held up. A cluster begins as a whole."""
    waiting = list(reversed(clusters))
    going: list[tuple[Block, Iterator[None]]] = []
    idle, progress = 0, 0
    while waiting or going:
        while waiting and len(going) + len(waiting[-1].members) <= resident:
            going += [(block, block.run()) for block in waiting.pop().members]
        if not going:
            raise ValueError(f"execute: a cluster has more blocks than the {resident} that are resident")
        index = choose.randrange(len(going))
        block, steps = going[index]
        try:
            next(steps)
            idle = idle + 1 if block.memory.progress == progress else 0
            progress = block.memory.progress
            if idle > _IDLE_ROUNDS * len(going):
                raise Fault(
                    "deadlock", f"{len(going)} blocks wait for each other, {len(waiting)} cannot start"
                )
        except StopIteration:
            going.pop(index)
            idle = 0
        except Fault as fault:
            step = machine.steps[block.pc].instruction
            message = str(fault).partition(": ")[2]
            place = f"{step.source}, block {block.place}"
            raise Fault(fault.check, f"{message}\n    {step}\n    {place}") from fault
