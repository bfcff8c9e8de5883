"""Instructions of sm_90: barriers in shared memory, tiles copied by the copy engine, products of warpgroups.

All that is asynchronous arrives as late as it may: a tile when nobody can go on without one, a product when
its group is waited for. Until then its destination is not to be read, and its operands not to be written.

Source: PTX ISA 8.8, "mbarrier", "Tensor Copies", "Asynchronous Warpgroup Level Matrix Instructions"; for
layouts of tiles and operands, "Swizzling Modes" and "Strides".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gptkern.testing.ptx import matrix
from gptkern.testing.ptx.access import AccessInstructions, naming
from gptkern.testing.ptx.arithmetic import Array
from gptkern.testing.ptx.cluster import parts_of
from gptkern.testing.ptx.memory import Fault
from gptkern.testing.ptx.operands import lanes_of
from gptkern.testing.ptx.order import Order

if TYPE_CHECKING:
    from gptkern.testing.ptx.block import Block, Execute, Mask
    from gptkern.testing.ptx.parse import Instruction

_TILE = re.compile(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]")
_RANK = re.compile(r"[1-5]d")
WARPGROUP = 128
# Bytes of a row within which 16-byte pieces change places, by the mode's number in a map and in a descriptor.
_MAP_SPANS, _DESCRIPTOR_SPANS = {0: 16, 1: 32, 2: 64, 3: 128}, {0: 16, 1: 128, 2: 64, 3: 32}


@dataclass(frozen=True)
class TensorMap:
    """A tensor of which tiles are copied: its layout, the tile, and how the tile lies in shared memory.

    Attributes:
        shape, strides, box: Outermost dimension first; ``box`` is a tile's.
        swizzle: The mode's number in a tensor map: 0 none, 1 to 3 for 32, 64 and 128 bytes.
    """

    base: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


@dataclass
class Barrier:
    """An mbarrier's state.

    Attributes:
        maker: The warp that made it.
        gathered: What was seen and done by those that arrived in this phase; ``visible``: in those before.
        tiles: Positions and bytes that are under way.
    """

    count: int
    order: Order
    maker: int
    pending: int = 0
    bytes: int = 0
    completed: int = 0
    gathered: Array | None = None
    visible: Array | None = None
    tiles: list[tuple[Array, Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pending = self.count

    @property
    def phase(self) -> int:
        """The parity of the phase that goes on."""
        return self.completed & 1

    def gather(self, seen: Array) -> None:
        """Note what was done before this phase ends."""
        self.gathered = seen if self.gathered is None else np.maximum(self.gathered, seen)

    def arrive(self, warps: Array, count: int) -> None:
        """Arrivals by these warps, one."""
        self.gather(self.order.released(warps))
        self.pending -= count
        if self.pending < 0:
            raise Fault("barrier", "more arrivals than the barrier was made for")
        self.settle()

    def settle(self) -> None:
        """Begin the next phase if all have arrived and all bytes with them."""
        if self.pending == 0 and self.bytes == 0:
            self.completed += 1
            self.visible = self.gathered
            self.pending = self.count


def swizzled(addresses: Array, span: int) -> Array:
    """The addresses of bytes: within ``span`` bytes, 16-byte pieces change places by the row's number."""
    bits = {16: 0, 32: 1, 64: 3, 128: 7}[span]
    return np.asarray(addresses ^ (((addresses >> 7) & bits) << 4))


class HopperInstructions(AccessInstructions):
    """Part of ``Machine``.

    Attributes:
        fenced_barriers: Between the making of a barrier and its use by the copy engine a fence is asked for.
    """

    fenced_barriers = True

    def _lane_value(self, block: Block, fetch: Any, mask: Mask, what: str) -> tuple[int, int]:
        """(value, lane) where one lane alone takes part."""
        lanes = lanes_of(block, mask)
        if len(lanes) != 1:
            raise Fault("convergence", f"{what} by {len(lanes)} lanes; one is meant")
        return int(np.broadcast_to(fetch(block), block.threads)[lanes[0]]), int(lanes[0])

    def _mbarrier(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        ways = {
            "init": self._begin, "inval": self._begin, "arrive": self._arrival, "expect_tx": self._expected,
            "try_wait": self._phase, "test_wait": self._phase,
        }  # fmt: skip
        if parts[1] not in ways:
            raise NotImplementedError(str(instruction))
        return ways[parts[1]](parts, instruction)

    def _begin(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        place = self._address(instruction.operands[0], "u32")
        count = self.value(instruction.operands[1], "u32") if parts[1] == "init" else None

        def execute(block: Block, mask: Mask) -> None:
            address, lane = self._lane_value(block, place, mask, instruction.opcode)
            index = block.shared.index(np.array([address], np.uint32), 8)
            block.shared.write(
                index, np.zeros((1, 8), np.uint8), block.warp[lane : lane + 1], np.array([lane])
            )
            if count is not None:
                arrivals = int(np.broadcast_to(count(block), block.threads)[lane])
                block.barriers[address] = Barrier(arrivals, block.cluster.order, int(block.warp[lane]))
            elif block.barriers.pop(address).tiles:
                raise Fault("pending", "a barrier ends while tiles are under way to it")

        return execute

    def _arrival(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, address, *more = instruction.operands
        place = self._address(address, "u32")
        expects = "expect_tx" in parts
        amount = self.value(more[0] if more else "1", "u32")
        remote = "shared_cluster" in parts

        def execute(block: Block, mask: Mask) -> None:
            lanes, addresses = lanes_of(block, mask), place(block)
            amounts = np.broadcast_to(amount(block), block.threads)
            tokens = np.zeros(block.threads, np.uint64)
            for lane in lanes:
                barrier = barrier_at(block, int(addresses[lane]), block.warp[lane : lane + 1], remote)
                tokens[lane] = barrier.completed
                barrier.bytes += int(amounts[lane]) if expects else 0
                barrier.arrive(block.warp[lane : lane + 1], 1 if expects else int(amounts[lane]))
            block.memory.progress += 1
            for member in block.cluster.members:
                member.resume()
            block.put(destination, tokens, mask)

        return execute

    def _expected(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        """``mbarrier.expect_tx``: more bytes will arrive."""
        place, amount = (
            self._address(instruction.operands[0], "u32"),
            self.value(instruction.operands[1], "u32"),
        )

        def execute(block: Block, mask: Mask) -> None:
            addresses, amounts = place(block), np.broadcast_to(amount(block), block.threads)
            for lane in lanes_of(block, mask):
                warps = block.warp[lane : lane + 1]
                barrier_at(block, int(addresses[lane]), warps).bytes += int(amounts[lane])

        return execute

    def _phase(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        destination, address, awaited, *_ = instruction.operands
        by_parity = "parity" in parts
        place, fetch = self._address(address, "u32"), self.value(awaited, "u32" if by_parity else "b64")

        def execute(block: Block, mask: Mask) -> None:
            ready = np.zeros(block.threads, bool)
            addresses, wanted = place(block), np.broadcast_to(fetch(block), block.threads)
            lanes = lanes_of(block, mask)
            for address in np.unique(addresses[lanes]):
                here = lanes[addresses[lanes] == address]
                warps = np.unique(block.warp[here])
                barrier = barrier_at(block, int(address), warps)
                # A wait for the phase before returns at once: nothing need have arrived.
                asked = wanted[here] & 1 if by_parity else wanted[here]
                done = asked != (barrier.phase if by_parity else barrier.completed)
                ready[here] = done
                block.hold(here[~done], int(address))
                if np.any(done) and barrier.visible is not None:
                    block.cluster.order.acquire(np.unique(block.warp[here[done]]), barrier.visible)
            block.memory.progress += bool(np.any(ready[lanes]))
            block.put(destination, ready, mask)

        return execute

    def _st(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        if "async" not in parts:
            return super()._st(parts, instruction)
        to, source, barrier_place = instruction.operands
        data, size = self.stored(source, parts[-1])
        place, barriers = self._address(to, "u32"), self._address(barrier_place, "u32")

        def execute(block: Block, mask: Mask) -> None:
            """Bytes to a block of the cluster, which arrive with its mbarrier's phase."""
            lanes = lanes_of(block, mask)
            values = data(block, lanes)
            with naming(lanes):
                for home, chosen, addresses in parts_of(block, place(block)[lanes], remote=True):
                    warps, index = block.warp[lanes[chosen]], home.shared.index(addresses, size)
                    home.shared.await_write(index, warps)
                    (owner, _, where), *others = parts_of(block, barriers(block)[lanes[chosen]], remote=True)
                    if others or owner is not home:
                        raise Fault("barrier", "st.async to another block than its mbarrier's")
                    for row, address in enumerate(where):
                        barrier = barrier_at(home, int(address), warps[row : row + 1])
                        barrier.tiles.append((index[row : row + 1], values[chosen[row : row + 1]]))

        return execute

    def _fence(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        def execute(block: Block, mask: Mask) -> None:
            warps = np.unique(block.warp if mask is None else block.warp[mask])
            if "proxy" in parts:
                block.cluster.order.fence(warps)
            elif "mbarrier_init" in parts:
                for address, barrier in block.barriers.items():
                    if barrier.maker in warps:
                        block.shared.fence_barrier(address + np.arange(8))

        return execute

    def _tile_copy(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        """``cp.async.bulk.tensor`` from global to shared memory."""
        if (
            "shared_cta" not in parts
            or not any(_RANK.fullmatch(part) for part in parts)
            or "mbarrier_complete_tx_bytes" not in "_".join(parts)
        ):
            raise NotImplementedError(str(instruction))
        to, source, barrier_operand = instruction.operands
        found = _TILE.fullmatch(source)
        assert found is not None
        fetch = self.value
        place, barrier_place = self._address(to, "u32"), self._address(barrier_operand, "u32")
        which = fetch(found.group(1), "u64")
        # The innermost dimension comes first.
        coordinates = [fetch(name.strip(), "s32") for name in reversed(found.group(2).split(","))]

        def copied(block: Block, address: int, lane: int) -> None:
            tensor_map = block.maps[int(np.broadcast_to(which(block), block.threads)[lane])]
            corner = [int(np.broadcast_to(at(block), block.threads)[lane]) for at in coordinates]
            data = _tile(block, tensor_map, lane, corner)
            rows, width = data.shape
            span = _MAP_SPANS[tensor_map.swizzle]
            align = 128 if tensor_map.swizzle == 0 else 8 * span
            if address % min(align, 1024):
                raise Fault("alignment", f"a tile of {span}-byte swizzle at shared address {address:#x}")
            inside = np.arange(width) + np.arange(rows)[:, None] * width
            positions = swizzled(address + inside, span).reshape(-1, 1)
            if np.any(positions >= len(block.shared.data)):
                raise Fault("bounds", f"a tile of {rows * width} bytes at shared address {address:#x}")
            block.shared.await_tile(positions, np.full(len(positions), block.warp[lane]))
            where, asker = (
                int(np.broadcast_to(barrier_place(block), block.threads)[lane]),
                block.warp[lane : lane + 1],
            )
            barrier = barrier_at(block, where, asker)
            if self.fenced_barriers:
                made = block.shared.index(np.array([where], np.uint32), 8)
                block.shared.check_fenced(
                    made, asker, "the copy engine arrives at a barrier that a lane made"
                )
            barrier.tiles.append((positions, data.reshape(-1, 1)))

        def execute(block: Block, mask: Mask) -> None:
            """A wide tile is several copies, each by a warp of its own."""
            lanes, addresses = lanes_of(block, mask), np.broadcast_to(place(block), block.threads)
            if len(np.unique(block.warp[lanes])) != len(lanes):
                raise Fault("convergence", f"{instruction.opcode} by {len(lanes)} lanes; one a warp is meant")
            for lane in lanes.tolist():
                copied(block, int(addresses[lane]), lane)

        return execute

    def _groups(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        """The end of a group of products, or the wait for one."""
        most = int(instruction.operands[0], 0) if parts[1] == "wait_group" else 0

        def execute(block: Block, mask: Mask) -> None:
            for group in _warpgroups(block, mask, instruction):
                if parts[1] == "commit_group":
                    block.products[group].commit()
                else:
                    block.products[group].wait(most, block.shared)

        return execute

    def _wgmma(self, parts: tuple[str, ...], instruction: Instruction) -> Execute:
        if parts[1] == "fence":
            return lambda block, mask: None
        if parts[1] in ("commit_group", "wait_group"):
            return self._groups(parts, instruction)
        names, left, right, scale, *flags = instruction.operands
        results = self._vector(names)
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", parts[4])
        assert shape is not None
        n, k, kinds = int(shape.group(1)), int(shape.group(2)), (parts[-2], parts[-1])
        if parts[-3] != "f32" or [int(flag, 0) for flag in flags[:2]] != [1, 1]:
            raise NotImplementedError(str(instruction))
        fetch = self.value
        from_registers = left[0] == "{"
        a_group = [fetch(name, "b32") for name in self._vector(left)] if from_registers else []
        a_descriptor = None if from_registers else fetch(left, "u64")
        b_descriptor = fetch(right, "u64")
        transposed = [bool(int(flag, 0)) for flag in flags[2:]]
        a_transposed = not from_registers and bool(transposed) and transposed[0]
        b_transposed = bool(transposed) and transposed[-1]
        keeps = fetch(scale, "pred")

        def execute(block: Block, mask: Mask) -> None:
            groups = _warpgroups(block, mask, instruction)
            columns = {}
            for index, name in enumerate(results):
                known = block.registers.get(name)
                columns[index] = (
                    np.zeros(block.threads, np.float32) if known is None else known.view(np.float32).copy()
                )
            keep = np.broadcast_to(keeps(block), block.threads)
            descriptors = np.broadcast_to(b_descriptor(block), block.threads)
            for group in groups.tolist():
                lanes = slice(group * WARPGROUP, (group + 1) * WARPGROUP)
                if from_registers:
                    registers = np.stack(
                        [np.broadcast_to(f(block), block.threads)[lanes] for f in a_group], axis=1
                    )
                    a = _rows_of(registers.reshape(4, 32, -1), kinds[0])
                else:
                    assert a_descriptor is not None
                    word = int(np.broadcast_to(a_descriptor(block), block.threads)[lanes][0])
                    a = _operand(block, word, group, (64, k), kinds[0], a_transposed)
                b = _operand(block, int(descriptors[lanes][0]), group, (n, k), kinds[1], b_transposed)
                _accumulate(columns, a @ b.T, lanes, bool(keep[lanes][0]))
                block.products[group].names.update(results)
            for index, name in enumerate(results):
                block.put(name, columns[index].view(np.uint32), mask)

        return execute


def _warpgroups(block: Block, mask: Mask, instruction: Instruction) -> Array:
    """The warpgroups that take part, all of whose lanes must."""
    if mask is None:
        return np.arange(len(block.products))
    some, all_of = (how(mask.reshape(-1, WARPGROUP), axis=1) for how in (np.any, np.all))
    if not np.array_equal(some, all_of):
        raise Fault("convergence", f"{instruction.opcode} by a part of a warpgroup")
    return np.flatnonzero(some)


def _accumulate(columns: dict[int, Array], product: Array, lanes: slice, keep: bool) -> None:
    """Add (64, n) to the accumulators of a warpgroup's lanes."""
    within = np.arange(WARPGROUP)
    row, lane = 16 * (within // 32) + ((within % 32) >> 2), within % 4
    for index, values in columns.items():
        part = product[row + 8 * ((index >> 1) & 1), 8 * (index >> 2) + 2 * lane + (index & 1)]
        values[lanes] = (part + (values[lanes].astype(np.float64) if keep else 0)).astype(np.float32)


def _rows_of(registers: Array, kind: str) -> Array:
    """A in registers, (4 warps, 32, 4), as 64 rows."""
    per = {"tf32": 1, "bf16": 2, "f16": 2}.get(kind, 4)
    rows, columns, _, _ = matrix._operand_places(8 * per, per)
    out = np.zeros((4, 16, 8 * per))
    out[:, rows, columns] = matrix.elements(registers, kind)
    return out.reshape(64, -1)


def _operand(
    block: Block, word: int, group: int, extents: tuple[int, int], kind: str, transposed: bool
) -> Array:
    """(rows, k) of a warpgroup's operand in shared memory, by its descriptor."""
    rows, k = extents
    size = {"tf32": 4, "bf16": 2, "f16": 2}.get(kind, 1)
    base, leading, stride = ((word >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span = _DESCRIPTOR_SPANS[word >> 62]
    row, byte = np.arange(rows)[:, None], np.arange(k)[None] * size
    if transposed:
        across, depth = np.arange(rows)[:, None] * size, np.arange(k)[None]
        if span == 16:
            places = across % 16 + across // 16 * stride + depth % 8 * 16 + depth // 8 * leading
        else:
            places = across % span + across // span * leading + depth % 8 * span + depth // 8 * stride
    elif span == 16:
        places = row % 8 * 16 + row // 8 * stride + byte // 16 * leading + byte % 16
    else:
        places = row % 8 * span + row // 8 * stride + byte
    positions = swizzled(base + places, span).reshape(-1)
    index = block.shared.index(positions.astype(np.uint32), size)
    data = block.shared.read_by_engine(index, block.warps.start + 4 * group + np.arange(4))
    block.products[group].uses(index, block.shared)
    return _decoded(data, kind).reshape(rows, k)


def _decoded(data: Array, kind: str) -> Array:
    words = np.zeros((len(data), 4), np.uint8)
    words[:, : data.shape[1]] = data
    return matrix.elements(words.view(np.uint32), kind)[:, 0].astype(np.float64)


def _tile(block: Block, tensor_map: TensorMap, lane: int, corner: list[int]) -> Array:
    """The bytes of a tile, zero beyond the tensor, for a lane: (rows, bytes of the innermost dimension)."""
    size, rank = tensor_map.base.element_size(), len(corner)
    inside, addresses = np.ones(tensor_map.box, bool), np.zeros(tensor_map.box, np.int64)
    for axis, (first, extent) in enumerate(zip(corner, tensor_map.box, strict=True)):
        at = (first + np.arange(extent)).reshape([-1 if axis == other else 1 for other in range(rank)])
        inside &= (at >= 0) & (at < tensor_map.shape[axis])
        addresses += at * tensor_map.strides[axis]
    out = np.zeros((*tensor_map.box, size), np.uint8)
    if np.any(inside):
        where = np.uint64(tensor_map.base.data_ptr()) + (addresses[inside] * size).astype(np.uint64)
        askers = np.full(len(where), lane)
        early = block.early(askers)
        block.touched(None, where, size, askers)
        out[inside] = block.memory.read(where, size, block.those(askers), early=early)
    return out.reshape(-1, tensor_map.box[-1] * size)


def barrier_at(block: Block, address: int, warps: Array, remote: bool = False) -> Barrier:
    """The barrier at an address of shared memory, used by these warps."""
    ((home, _, offsets),) = parts_of(block, np.array([address], np.uint32), remote)
    if int(offsets[0]) not in home.barriers:
        raise Fault("barrier", f"no barrier was made at shared address {int(offsets[0]):#x}")
    index = home.shared.index(offsets, 8)
    home.shared.check_atomic(np.repeat(index, len(warps), axis=0), warps)
    return home.barriers[int(offsets[0])]


def deliver(block: Block, barrier: Barrier) -> bool:
    """Let the tiles that are under way to a barrier of this block arrive; False if there are none."""
    if not barrier.tiles:
        return False
    for positions, data in barrier.tiles:
        block.shared.deliver(positions, data)
        barrier.bytes -= data.size
    barrier.gather(barrier.order.released(np.array([barrier.order.engine])))
    barrier.tiles = []
    barrier.settle()
    return True


@dataclass
class Products:
    """A warpgroup's running products: registers not to be read yet, memory not to be written."""

    names: set[str] = field(default_factory=set)
    used: list[Array] = field(default_factory=list)
    groups: list[tuple[set[str], list[Array]]] = field(default_factory=list)

    def uses(self, index: Array, shared: Any) -> None:
        """These bytes are operands."""
        shared.busy[index] += 1
        self.used.append(index)

    def commit(self) -> None:
        """Close the group."""
        self.groups.append((self.names, self.used))
        self.names, self.used = set(), []

    def wait(self, most: int, shared: Any) -> None:
        """All groups but the last ``most`` are done."""
        done = len(self.groups) - most
        for _, used in self.groups[: max(done, 0)]:
            for index in used:
                shared.busy[index] -= 1
        self.groups = self.groups[max(done, 0) :]

    def running(self, name: str) -> bool:
        """True if a product may still write the register."""
        return name in self.names or any(name in names for names, _ in self.groups)
