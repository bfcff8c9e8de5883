"""Instructions made ready to execute: each becomes a function of a block and the lanes that take part."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from gptkern.testing.ptx import arithmetic, double, flow, matrix
from gptkern.testing.ptx.access import naming
from gptkern.testing.ptx.arithmetic import DTYPES, Array
from gptkern.testing.ptx.block import Block, Execute, Mask, Step
from gptkern.testing.ptx.hopper import HopperInstructions
from gptkern.testing.ptx.memory import Fault
from gptkern.testing.ptx.operands import Fetch, lanes_of
from gptkern.testing.ptx.parse import Instruction, Program, split

_IGNORED = {"prefetch", "membar", "nanosleep", "discard", "applypriority", "setmaxnreg"}
# They may wait for another block, or let one go on.
_YIELDING = ("acquire", "relaxed", "volatile", "release")


def _whole_warps(block: Block, mask: Mask, instruction: Instruction) -> Array:
    """The warps that take part, all of whose lanes must."""
    if mask is None:
        return np.arange(block.threads // 32)
    by_warp = mask.reshape(-1, 32)
    some = np.any(by_warp, axis=1)
    if not np.all(by_warp[some]):
        raise Fault("convergence", f"{instruction.opcode} by a part of a warp")
    return np.flatnonzero(some)


class Machine(HopperInstructions):
    """The steps of a program."""

    def __init__(self, program: Program, fenced_barriers: bool = True) -> None:
        super().__init__(program)
        self.fenced_barriers = fenced_barriers
        first = (instruction.operands[0] for instruction in program.instructions if instruction.operands)
        self._ever_set = {name for operand in first for name in re.split(r"[\s{},|]+", operand)}
        self.steps = [self._step(instruction) for instruction in program.instructions]
        self.order = flow.Order(len(self.steps), dict(self._ways()))

    def _ways(self) -> Iterator[tuple[int, list[int]]]:
        """The steps at which lanes may part or end, and where they go on."""
        for at, step in enumerate(self.steps):
            if step.kind not in ("branch", "indexed", "return"):
                continue
            targets = [step.target] if step.kind == "branch" else []
            targets += step.targets.tolist() if step.targets is not None else []
            if step.instruction.predicate is not None:
                targets.append(at + 1)
            yield at, [target for target in targets if target < len(self.steps)]

    def _step(self, instruction: Instruction) -> Step:
        parts = tuple(instruction.opcode.replace("::", "_").split("."))
        name = parts[0]
        if name == "bra":
            return Step(instruction, "branch", target=self.program.labels[instruction.operands[0]])
        if name == "brx":
            where = self.program.targets[instruction.operands[1]]
            targets = np.array([self.program.labels[label] for label in where])
            return Step(
                instruction, "indexed", index=self.value(instruction.operands[0], "u32"), targets=targets
            )
        if name in ("ret", "exit"):
            return Step(instruction, "return")
        if name == "barrier" and "cluster" in parts:
            return Step(instruction, "cluster " + parts[2])
        if name in ("bar", "barrier") and "warp" not in parts:
            return Step(instruction, "barrier")
        yields = name in ("atom", "red") or any(part in _YIELDING for part in parts)
        polls = name == "mbarrier" and parts[1].endswith("wait")
        return Step(instruction, "plain", self._executed(parts, instruction), yields=yields, polls=polls)

    def _executed(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        name = parts[0]
        if name in _IGNORED:
            return lambda block, mask: None
        if name == "bar":
            return _meet
        own = getattr(self, f"_{name}", None)
        if own is not None:
            made: Execute = own(parts, instruction)
            return made
        function = (double if parts[-1] == "f64" else arithmetic).function_of(parts)
        if function is None:
            raise NotImplementedError(f"{instruction.opcode} ({instruction.source})")
        kind = parts[-1]
        destination, *sources = instruction.operands
        shifting = name in ("shl", "shr")
        fetched = [self.value(s, "u32" if shifting and i else kind) for i, s in enumerate(sources)]
        if name in ("mad", "fma") and "wide" in parts:
            fetched[2] = self.value(sources[2], kind[0] + str(2 * int(kind[1:])))
        if name in ("bfe", "bfi"):
            numbers = slice(len(sources) - 2, None)
            fetched[numbers] = [self.value(source, "u32") for source in sources[numbers]]

        def execute(block: Block, mask: Mask) -> None:
            with np.errstate(all="ignore"):
                block.put(destination, function(*(fetch(block) for fetch in fetched)), mask)

        return execute

    # --- moves

    def _mov(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, source = instruction.operands
        kind = parts[-1]
        if destination[0] == "{":
            names = split(destination[1:-1])
            fetch = self.value(source, kind)
            size = np.dtype(DTYPES[kind]).itemsize // len(names)

            def unpack(block: Block, mask: Mask) -> None:
                pieces = np.ascontiguousarray(np.broadcast_to(fetch(block), block.threads)).view(f"u{size}")
                for index, name in enumerate(names):
                    block.put(name, pieces.reshape(block.threads, -1)[:, index], mask)

            return unpack
        if source[0] == "{":
            names = split(source[1:-1])
            piece = f"b{8 * np.dtype(DTYPES[kind]).itemsize // len(names)}"
            fetches = [self.value(name, piece) for name in names]

            def pack(block: Block, mask: Mask) -> None:
                columns = [np.broadcast_to(fetch(block), block.threads) for fetch in fetches]
                block.put(destination, np.stack(columns, axis=1).view(DTYPES[kind])[:, 0], mask)

            return pack
        fetch = self.value(source, kind)
        return lambda block, mask: block.put(destination, fetch(block), mask)

    def _selp(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, a, b, condition = instruction.operands
        first, second, chosen = (
            self.value(a, parts[-1]),
            self.value(b, parts[-1]),
            self.value(condition, "pred"),
        )
        return lambda block, mask: block.put(
            destination, np.where(chosen(block), first(block), second(block)), mask
        )

    def _setp(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, left, right, *more = instruction.operands
        names, kind, how = destination.split("|"), parts[-1], parts[1]
        if more or (len(names) == 2) != kind.endswith("x2"):
            raise NotImplementedError(str(instruction))
        first, second = self.value(left, kind), self.value(right, kind)

        def execute(block: Block, mask: Mask) -> None:
            a, b = (arithmetic.comparable(np.asarray(fetch(block)), kind) for fetch in (first, second))
            for name, x, y in zip(names, a, b, strict=True):
                found = arithmetic.compare(how, x, y)
                block.put(name, np.broadcast_to(found, block.threads).copy(), mask)

        return execute

    def _cvt(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, *sources = instruction.operands
        fetches = [self.value(source, parts[-1]) for source in sources]
        if len(sources) == 2:
            return self._converted_pair(parts, instruction, fetches)
        (fetch,) = fetches
        convert = (double if parts[-1] == "f64" else arithmetic).convert

        def execute(block: Block, mask: Mask) -> None:
            with np.errstate(all="ignore"):
                block.put(destination, convert(parts, np.asarray(fetch(block))), mask)

        return execute

    def _converted_pair(
        self, parts: tuple[str, ...], instruction: Instruction, fetches: list[Fetch]
    ) -> Execute:
        """Two numbers become a pair. The compiler leaves a half unset of which it makes no use."""
        destination, *sources = instruction.operands
        unset = [source for source in sources if source[0] == "%" and source not in self._ever_set]

        def execute(block: Block, mask: Mask) -> None:
            for source in unset:
                block.put(source, block.bits_or_unset(source), None)
            halves = (fetch(block) for fetch in fetches)
            block.put(destination, arithmetic.convert_pair(parts, *halves), mask)

        return execute

    def _griddepcontrol(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        if parts[1] == "wait":
            return lambda block, mask: block.await_launches(lanes_of(block, mask))
        return lambda block, mask: block.let_dependents_start()

    # --- asynchronous copies

    def _cp(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        if "commit_group" in parts:
            return lambda block, mask: block.commit(mask)
        if "wait_group" in parts or "wait_all" in parts:
            most = int(instruction.operands[0], 0) if "wait_group" in parts else 0
            return lambda block, mask: block.wait(most, mask)
        if "bulk" in parts:
            return self._tile_copy(parts, instruction)
        to, source, count, *given = instruction.operands
        size = int(count, 0)
        destination, address = self._address(to, "u32"), self._address(source, "u64")
        amount = self.value(given[0], "u32") if given else (lambda block: np.uint32(size))

        def execute(block: Block, mask: Mask) -> None:
            lanes = lanes_of(block, mask)
            positions = block.shared.index(destination(block)[lanes], size)
            data = np.zeros((len(lanes), size), np.uint8)
            wanted = np.broadcast_to(amount(block), block.threads)[lanes]
            for length in np.unique(wanted):
                if length:
                    these = np.flatnonzero(wanted == length)
                    sources = address(block)[lanes][these]
                    block.touched(None, sources, int(length), lanes[these])
                    with naming(lanes[these]):
                        early = block.early(lanes[these])
                        data[these, :length] = block.memory.read(
                            sources, int(length), block.those(lanes[these]), early=early
                        )
            block.shared.await_write(positions, block.warp[lanes])
            block.open.copies.append((lanes, positions, data))

        return execute

    # --- warps

    def _shfl(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, source, by, clamp, *_ = instruction.operands
        name, _, predicate = destination.partition("|")
        fetch, shift, limit = self.value(source, "b32"), self.value(by, "s32"), self.value(clamp, "s32")
        mode = parts[2]

        def execute(block: Block, mask: Mask) -> None:
            _whole_warps(block, mask, instruction)
            shape = (block.threads // 32, 32)
            amounts = np.broadcast_to(shift(block), block.threads).reshape(shape)
            limits = np.broadcast_to(limit(block), block.threads).reshape(shape)
            lane, inside = matrix.shuffle_source(mode, amounts, limits)
            values = np.broadcast_to(fetch(block), block.threads).reshape(shape)
            block.put(name, np.take_along_axis(values, lane, 1).reshape(-1), mask)
            if predicate:
                block.put(predicate, np.broadcast_to(inside, shape).reshape(-1), mask)

        return execute

    def _redux(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, source, *_ = instruction.operands
        fetch, reduce = self.value(source, parts[-1]), matrix.REDUCTIONS[parts[2]].reduce

        def execute(block: Block, mask: Mask) -> None:
            _whole_warps(block, mask, instruction)
            values = np.broadcast_to(fetch(block), block.threads).reshape(-1, 32)
            block.put(destination, np.repeat(reduce(values, axis=1), 32), mask)

        return execute

    def _vote(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, source, *_ = instruction.operands
        fetch, mode = self.value(source, "pred"), parts[2]

        def execute(block: Block, mask: Mask) -> None:
            _whole_warps(block, mask, instruction)
            values = np.broadcast_to(fetch(block), block.threads).reshape(-1, 32)
            if mode == "ballot":
                weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
                found = (values * weights).sum(axis=1).astype(np.uint32)
            else:
                found = np.any(values, axis=1) if mode == "any" else np.all(values, axis=1)
            block.put(destination, np.repeat(found, 32), mask)

        return execute

    def _elect(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        name, _, predicate = instruction.operands[0].partition("|")

        def execute(block: Block, mask: Mask) -> None:
            _whole_warps(block, mask, instruction)
            block.put(name, np.zeros(block.threads, np.uint32), mask)
            block.put(predicate, block.lane % 32 == 0, mask)

        return execute

    def _mma(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        names = [self._vector(operand) for operand in instruction.operands]
        depth = int(parts[3].rsplit("k", 1)[1])
        kinds, integer = (parts[-3], parts[-2]), parts[-1] == "s32"
        groups = [[self.value(name, "b32") for name in group] for group in names[1:]]

        def execute(block: Block, mask: Mask) -> None:
            _whole_warps(block, mask, instruction)
            a, b, c = (_columns(block, group) for group in groups)
            done = matrix.product(a, b, c, depth, kinds, integer).reshape(block.threads, -1)
            for index, name in enumerate(names[0]):
                block.put(name, done[:, index].copy(), mask)

        return execute

    def _ldmatrix(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        names = self._vector(instruction.operands[0])
        place, transposed = self._address(instruction.operands[1], "u32"), "trans" in parts
        rows = 8 * len(names)

        def execute(block: Block, mask: Mask) -> None:
            warps = _whole_warps(block, mask, instruction)
            addresses = place(block).reshape(-1, 32)[warps, :rows].reshape(-1)
            block.touched(block, addresses, 16, _askers(warps, rows))
            places = block.shared.index(addresses, 16)
            data = block.shared.read(places, _owners(block, warps, rows)).reshape(len(warps), rows, 16)
            loaded = matrix.gathered(data, len(names), transposed)
            for index, name in enumerate(names):
                column = np.zeros((block.threads // 32, 32), np.uint32)
                column[warps] = loaded[:, :, index]
                block.put(name, column.reshape(-1), mask)

        return execute

    def _stmatrix(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        place, transposed = self._address(instruction.operands[0], "u32"), "trans" in parts
        group = [self.value(name, "b32") for name in self._vector(instruction.operands[1])]
        rows = 8 * len(group)

        def execute(block: Block, mask: Mask) -> None:
            warps = _whole_warps(block, mask, instruction)
            data = matrix.scattered(_columns(block, group)[warps], transposed).reshape(-1, 16)
            addresses = place(block).reshape(-1, 32)[warps, :rows].reshape(-1)
            block.touched(block, addresses, 16, _askers(warps, rows))
            block.shared.write(block.shared.index(addresses, 16), data, _owners(block, warps, rows))

        return execute


def _meet(block: Block, mask: Mask) -> None:
    """``bar.warp.sync``: the lanes of a warp see each other's work where all of them come."""
    whole = np.all((block.alive if mask is None else mask | ~block.alive).reshape(-1, 32), axis=1)
    some = np.any((block.alive if mask is None else mask).reshape(-1, 32), axis=1)
    block.cluster.order.meet(np.flatnonzero(whole & some) + block.warps.start)


def _columns(block: Block, group: list[Fetch]) -> Array:
    """Registers as (warps, 32, count)."""
    columns = [np.broadcast_to(fetch(block), block.threads) for fetch in group]
    return np.stack(columns, axis=1).reshape(block.threads // 32, 32, -1)


def _askers(warps: Array, rows: int) -> Array:
    """The lanes that give the addresses of a matrix instruction's rows."""
    return np.asarray((32 * warps[:, None] + np.arange(rows)).reshape(-1))


def _owners(block: Block, warps: Array, rows: int) -> Array:
    """The warp of each row, by its number in the cluster."""
    return np.repeat(warps.astype(np.int32), rows) + np.int32(block.warps.start)
