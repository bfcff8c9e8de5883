"""Loads, stores and atomics: of global, shared and parameter memory, by space or by generic address."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from gptkern.testing.ptx import matrix
from gptkern.testing.ptx.arithmetic import DTYPES, Array
from gptkern.testing.ptx.cluster import RANK_SHIFT, WINDOW, parts_of
from gptkern.testing.ptx.memory import Fault
from gptkern.testing.ptx.operands import ADDRESS, PARAMETER_MEMORY, Operands, lanes_of

if TYPE_CHECKING:
    from gptkern.testing.ptx.block import Block, Execute, Mask
    from gptkern.testing.ptx.parse import Instruction

# Whose shared memory (None: global memory), which of the lanes, and the addresses there.
_Place = tuple["Block | None", Array, Array]
_LANE = re.compile(r"\blane (\d+)")
_FLOATS = ("f16", "bf16", "f32", "f64")
_ATOMICS = ("add", "exch", "cas", "min", "max", "and", "or", "xor", "inc", "dec")


@contextmanager
def naming(lanes: Array) -> Iterator[None]:
    """A fault within names a lane by its place among these: name it by its number in the block."""
    try:
        yield
    except Fault as fault:
        message = str(fault).partition(": ")[2]
        named = _LANE.sub(lambda name: f"lane {lanes[int(name.group(1))]}", message)
        raise Fault(fault.check, named) from None


def space_of(parts: tuple[str, ...]) -> str:
    """The state space of an opcode: global, shared, shared_cta, shared_cluster, param or generic."""
    known = ("global", "shared", "shared_cta", "shared_cluster", "param")
    return next((part for part in parts[1:] if part in known), "generic")


class AccessInstructions(Operands):
    """Part of ``Machine``."""

    def place(self, operand: str, space: str) -> Any:
        """An address operand, one a lane."""
        return self._address(operand, "u32" if space.startswith("shared") else "u64")

    @staticmethod
    def targets(block: Block, space: str, addresses: Array) -> list[_Place]:
        """The memory in which each of these addresses lies."""
        if space == "global":
            return [(None, np.arange(len(addresses)), addresses)]
        if space.startswith("shared"):
            return list(parts_of(block, addresses, remote=space == "shared_cluster"))
        inside = addresses // np.uint64(WINDOW) == 1
        lanes, found = np.flatnonzero(inside), list[_Place]()
        if len(lanes):
            for home, chosen, offsets in parts_of(block, addresses[lanes] - np.uint64(WINDOW), remote=True):
                found.append((home, lanes[chosen], offsets))
        if len(lanes) < len(addresses):
            others = np.flatnonzero(~inside)
            found.append((None, others, addresses[others]))
        return found

    # --- loads and stores

    def _ld(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        names, operand = self._vector(instruction.operands[0]), instruction.operands[1]
        kind, space = parts[-1], space_of(parts)
        size = np.dtype(DTYPES[kind]).itemsize
        if space == "param":
            return self._parameter(names, operand, kind, size)
        count = size * len(names)
        fetch = self.place(operand, space)
        acquires = "acquire" in parts
        unordered = acquires or "relaxed" in parts or "volatile" in parts

        def execute(block: Block, mask: Mask) -> None:
            lanes = lanes_of(block, mask)
            data = np.empty((len(lanes), count), np.uint8)
            with naming(lanes):
                for home, chosen, addresses in self.targets(block, space, fetch(block)[lanes]):
                    data[chosen] = _loaded(block, home, addresses, count, lanes[chosen], unordered)
                    if acquires:
                        _acquired(block, home, addresses, lanes[chosen])
            values = data.reshape(len(lanes), len(names), size)
            for index, name in enumerate(names):
                column = np.zeros(block.threads, DTYPES[kind])
                column[lanes] = np.ascontiguousarray(values[:, index]).view(DTYPES[kind])[:, 0]
                self._put_loaded(block, name, column, kind, mask)

        return execute

    def _parameter(self, names: tuple[str, ...], operand: str, kind: str, size: int) -> Execute:
        found = ADDRESS.fullmatch(operand)
        if found is None:
            raise NotImplementedError(f"the parameter {operand}")
        place = self._address(operand, "u64")

        def execute(block: Block, mask: Mask) -> None:
            offsets = place(block).astype(np.int64) - PARAMETER_MEMORY
            for index, name in enumerate(names):
                where = offsets[:, None] + np.arange(index * size, (index + 1) * size)
                lanes = lanes_of(block, mask)
                if np.any(where[lanes] < 0) or np.any(where[lanes] >= len(block.parameters)):
                    raise Fault("bounds", f"a parameter beyond the {len(block.parameters)} bytes of them")
                inside = np.clip(where, 0, len(block.parameters) - 1)
                column = np.ascontiguousarray(block.parameters[inside]).view(DTYPES[kind])[:, 0]
                self._put_loaded(block, name, column, kind, mask)

        return execute

    def _put_loaded(self, block: Block, name: str, column: Array, kind: str, mask: Mask) -> None:
        """Set a register that may be wider than what was loaded: signed types are extended by their sign."""
        if name == "_":
            return
        width = self.program.width(name)
        if width > column.dtype.itemsize:
            column = column.astype(DTYPES[("s" if kind[0] == "s" else "u") + str(8 * width)])
        block.put(name, column, mask)

    def _st(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        operand, kind, space = instruction.operands[0], parts[-1], space_of(parts)
        data, size = self.stored(instruction.operands[1], kind)
        place = self.place(operand, space)
        releases = "release" in parts
        unordered = releases or "relaxed" in parts or "volatile" in parts

        def execute(block: Block, mask: Mask) -> None:
            lanes = lanes_of(block, mask)
            values = data(block, lanes)
            with naming(lanes):
                for home, chosen, addresses in self.targets(block, space, place(block)[lanes]):
                    if releases:
                        _released(block, home, addresses, lanes[chosen])
                    block.touched(home, addresses, size, lanes[chosen])
                    if home is None:
                        early = block.early(lanes[chosen])
                        block.memory.write(
                            addresses,
                            values[chosen],
                            block.those(lanes[chosen]),
                            ordered=not unordered,
                            early=early,
                        )
                        continue
                    warps, index = block.warp[lanes[chosen]], home.shared.index(addresses, size)
                    if unordered:
                        home.shared.check_atomic(index, warps)
                        home.shared.update(index, values[chosen], warps)
                    else:
                        home.shared.write(index, values[chosen], warps, lanes[chosen])

        return execute

    def stored(self, operand: str, kind: str) -> tuple[Any, int]:
        """(a function of a block and lanes that gives (lanes, bytes), the bytes) of an operand to store."""
        fetches = [self.value(name, kind) for name in self._vector(operand)]
        size = np.dtype(DTYPES[kind]).itemsize * len(fetches)

        def data(block: Block, lanes: Array) -> Array:
            columns = [np.broadcast_to(fetch(block), block.threads)[lanes] for fetch in fetches]
            stacked = np.ascontiguousarray(np.stack(columns, axis=1))
            return stacked.view(np.uint8).reshape(len(lanes), size)

        return data, size

    # --- atomics

    def _atom(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        returns = parts[0] == "atom"
        destinations = self._vector(instruction.operands[0] if returns else "_")
        operand, *sources = instruction.operands[1 if returns else 0 :]
        kind, space = parts[-1], space_of(parts)
        what = next(part for part in parts if part in _ATOMICS)
        place = self.place(operand, space)
        fetches = [[self.value(name, kind) for name in self._vector(source)] for source in sources]
        count = len(fetches[0])
        size = np.dtype(DTYPES[kind]).itemsize * count
        acquires = bool({"acquire", "acq_rel"} & set(parts))
        releases = bool({"release", "acq_rel"} & set(parts))

        def execute(block: Block, mask: Mask) -> None:
            before = np.zeros((block.threads, count), DTYPES[kind])
            lanes = lanes_of(block, mask)
            values = [
                np.stack([np.broadcast_to(fetch(block), block.threads) for fetch in elements], axis=1)
                for elements in fetches
            ]
            with naming(lanes):
                for home, chosen, addresses in self.targets(block, space, place(block)[lanes]):
                    which = lanes[chosen]
                    block.touched(home, addresses, size, which)
                    if releases:
                        _released(block, home, addresses, which)
                    # Lanes with one address go one after another: the first of each address, then the second.
                    for turn in _turns(addresses):
                        lane = which[turn]
                        operands = [value[lane] for value in values]
                        before[lane] = _updated(block, home, addresses[turn], lane, what, kind, operands)
                    if acquires:
                        _acquired(block, home, addresses, which)
            for index, name in enumerate(destinations):
                block.put(name, np.ascontiguousarray(before[:, index]), mask)

        return execute

    _red = _atom

    # --- addresses

    def _cvta(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, source = instruction.operands
        fetch = self.value(source, parts[-1])
        shared = any(part.startswith("shared") for part in parts)
        more = np.uint64(0 if not shared else (1 << 64) - WINDOW if "to" in parts else WINDOW)

        def execute(block: Block, mask: Mask) -> None:
            with np.errstate(over="ignore"):
                block.put(destination, np.asarray(fetch(block)) + more, mask)

        return execute

    def _mapa(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        """The address in another block of what an address is in this one."""
        destination, source, rank = instruction.operands
        kind = parts[-1]
        fetch, which = self.value(source, kind), self.value(rank, "u32")
        dtype = DTYPES[kind]

        def execute(block: Block, mask: Mask) -> None:
            ranks = np.broadcast_to(which(block), block.threads)
            if np.any(ranks[lanes_of(block, mask)] >= len(block.cluster.members)):
                raise Fault("bounds", f"mapa to a block beyond the cluster's {len(block.cluster.members)}")
            offsets = np.broadcast_to(fetch(block), block.threads) & dtype((1 << RANK_SHIFT) - 1)
            there = offsets + ((ranks.astype(dtype) + dtype(1)) << dtype(RANK_SHIFT))
            block.put(destination, there + dtype(WINDOW if kind == "u64" else 0), mask)

        return execute

    def _getctarank(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, source = instruction.operands
        fetch = self.value(source, parts[-1])

        def execute(block: Block, mask: Mask) -> None:
            field = (np.asarray(fetch(block)) >> DTYPES[parts[-1]](RANK_SHIFT)) & 0xFF
            block.put(destination, np.where(field == 0, block.rank, field - 1).astype(np.uint32), mask)

        return execute


def _loaded(
    block: Block, home: Block | None, addresses: Array, count: int, lanes: Array, unordered: bool
) -> Array:
    block.touched(home, addresses, count, lanes)
    if home is None:
        early = block.early(lanes)
        return block.memory.read(addresses, count, block.those(lanes), ordered=not unordered, early=early)
    index, warps = home.shared.index(addresses, count), block.warp[lanes]
    return home.shared.read_atomically(index, warps) if unordered else home.shared.read(index, warps, lanes)


def _released(block: Block, home: Block | None, addresses: Array, lanes: Array) -> None:
    for address in np.unique(addresses):
        if home is None:
            block.memory.release(int(address), block.those(lanes[addresses == address]))
        else:
            home.shared.release(int(address), np.unique(block.warp[lanes[addresses == address]]))


def _acquired(block: Block, home: Block | None, addresses: Array, lanes: Array) -> None:
    for address in np.unique(addresses):
        if home is None:
            block.memory.acquire(int(address), block.number)
        else:
            home.shared.acquire(int(address), np.unique(block.warp[lanes[addresses == address]]))


def _turns(addresses: Array) -> list[Array]:
    """Positions of addresses, such that within each array no address comes twice, in their order."""
    order = np.argsort(addresses, kind="stable")
    ordered = addresses[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    begins = np.flatnonzero(first)
    turn = np.arange(len(order)) - begins[np.cumsum(first) - 1]
    return [order[turn == index] for index in range(int(turn.max()) + 1)]


def _updated(
    block: Block,
    home: Block | None,
    addresses: Array,
    lanes: Array,
    what: str,
    kind: str,
    values: list[Array],
) -> Array:
    """Read, change and write (lanes, elements); the values before."""
    lane_count, count = values[0].shape
    size = np.dtype(DTYPES[kind]).itemsize * count
    warps = block.warp[lanes]
    # A sum of floats depends on its order: one that timing decides is a race.
    ordered = what == "add" and kind in _FLOATS
    if home is None:
        early = block.early(lanes)
        data = block.memory.read(addresses, size, block.those(lanes), ordered=ordered, early=early)
    else:
        index = home.shared.index(addresses, size)
        data = home.shared.read_atomically(index, warps)
    old = np.array(np.ascontiguousarray(data).view(DTYPES[kind]))
    with np.errstate(all="ignore"):
        new = np.ascontiguousarray(_atomically(what, old, values), dtype=DTYPES[kind])
    changed = new.view(np.uint8).reshape(lane_count, size)
    if home is None:
        block.memory.write(addresses, changed, block.those(lanes), ordered=ordered, early=early)
    else:
        home.shared.update(index, changed, warps)
    return old


def _atomically(what: str, old: Array, values: list[Array]) -> Array:
    if what == "cas":
        return np.where(old == values[0], values[1], old)
    if what == "exch":
        return np.asarray(values[0])
    zero, one = np.zeros_like(old), np.ones_like(old)
    if what == "inc":
        return np.where(old >= values[0], zero, old + one)
    if what == "dec":
        return np.where((old == 0) | (old > values[0]), values[0], old - one)
    return np.asarray(matrix.REDUCTIONS[what](old, values[0]))
