"""Memory that knows what may be read and written, by whom, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gptkern.testing.ptx.arithmetic import Array
from gptkern.testing.ptx.dependent import Meetings, Use
from gptkern.testing.ptx.order import Order

_NOBODY = -1
# So many bytes beyond a tensor's end an address is hardly one of that tensor.
_FAR = 1 << 16
NO_TENSOR = "where no tensor is that was passed"


class Fault(Exception):
    """Something that a GPU would not forgive, or would forgive only sometimes.

    Attributes:
        check: The check that found it: bounds, alignment, uninitialised, pending, race, deadlock, ...
    """

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


@dataclass
class Threads:
    """Lanes of a block: whose access, or whose release, it is.

    Attributes:
        warps: One a lane, by its number in ``order``, which is that among the warps of the block's cluster.
    """

    block: int
    warps: Array
    order: Order


class _Last:
    """The last access to each byte: its block and the block's clock then, its warp and the order's time."""

    def __init__(self, size: int) -> None:
        self.block, self.clock = np.full(size, _NOBODY, np.int32), np.zeros(size, np.int64)
        self.warp, self.time = np.zeros(size, np.int32), np.zeros(size, np.int32)

    def note(self, index: Array, who: Threads, clock: int) -> None:
        self.block[index], self.clock[index] = who.block, clock
        self.warp[index] = np.broadcast_to(who.warps[:, None], index.shape)
        self.time[index] = who.order.time


@dataclass
class _Allocation:
    begin: int
    name: str
    data: Array
    written: Array
    writes: _Last
    reads: _Last
    was_read: Array
    was_written: Array
    meetings: Meetings

    @property
    def end(self) -> int:
        return self.begin + len(self.data)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the end of its last element."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _memory(tensor: torch.Tensor, begin: int, end: int) -> Array:
    """These bytes of a tensor's storage."""
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
    start = begin - flat.data_ptr()
    return flat[start : start + end - begin].numpy()


class Global:
    """The tensors of a launch. An access outside of all of them is a fault.

    Args:
        tensors: By name. Those that share memory count as one.
        fresh: Names of tensors that nobody has written: reading a byte before it is written is a fault.
        blocks: Number of blocks, for the order between them.
        before: Bytes that launches before may still be using, until a thread has waited for them.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], fresh: set[str], blocks: int, before: Sequence[Use] = ()
    ) -> None:
        self._before = list(before)
        spans = sorted((*_span(tensor), name) for name, tensor in tensors.items() if tensor.numel())
        unions: list[list[tuple[int, int, str]]] = []
        for span in spans:
            if unions and span[0] < max(end for _, end, _ in unions[-1]):
                unions[-1].append(span)
            else:
                unions.append([span])
        self._allocations = [self._allocation(union, tensors, fresh) for union in unions]
        self.dependent = bool(before)
        self._begins = np.array([item.begin for item in self._allocations], dtype=np.uint64)
        # Vector clocks: how far each block has seen each other's work. Released with a store or an atomic.
        self.clocks = np.tile(np.int64(0), (blocks, blocks))
        self.clocks[np.arange(blocks), np.arange(blocks)] = 1
        # What of its own warps' work a block has given on with each release, by the times of their order.
        self._releases: dict[int, list[Array]] = {}
        self._released: dict[int, Array] = {}
        self.progress = 0  # by which a scheduler sees that something goes on

    def _allocation(
        self, union: list[tuple[int, int, str]], tensors: dict[str, torch.Tensor], fresh: set[str]
    ) -> _Allocation:
        begin, end = union[0][0], max(end for _, end, _ in union)
        written = np.zeros(end - begin, bool)
        for first, last, name in union:
            written[first - begin : last - begin] |= name not in fresh
        data = _memory(tensors[union[0][2]], begin, end)
        names = ", ".join(name for _, _, name in union)
        return _Allocation(
            begin, names, data, written, _Last(end - begin), _Last(end - begin),
            np.zeros(end - begin, bool), np.zeros(end - begin, bool),
            Meetings(begin, end - begin, self._before),
        )  # fmt: skip

    def uses(self, launch: str) -> list[Use]:
        """The bytes that were read and written."""
        return [
            Use(launch, item.begin, item.data, item.was_read, item.was_written) for item in self._allocations
        ]

    def _place(self, addresses: Array, size: int) -> tuple[_Allocation, Array]:
        if np.any(addresses % np.uint64(size)):
            lane = int(np.argmax(addresses % np.uint64(size) != 0))
            raise Fault("alignment", f"lane {lane} accesses {size} bytes at {int(addresses[lane]):#x}")
        which = np.searchsorted(self._begins, addresses, side="right").astype(np.int64) - 1
        first = int(which[0])
        if first >= 0 and np.all(which == first):
            item = self._allocations[first]
            offsets = (addresses - np.uint64(item.begin)).astype(np.int64)
            if np.all(offsets + size <= len(item.data)):
                return item, offsets
        raise _Elsewhere(which)

    def _parts(self, addresses: Array, size: int) -> list[tuple[Array, _Allocation, Array]]:
        """The lanes of each tensor, the tensor, and offsets within it."""
        try:
            item, offsets = self._place(addresses, size)
            return [(np.arange(len(addresses)), item, offsets)]
        except _Elsewhere as elsewhere:
            parts = []
            for index in np.unique(elsewhere.which):
                lanes = np.flatnonzero(elsewhere.which == index)
                if index < 0:
                    place = int(addresses[lanes[0]])
                    raise Fault("bounds", f"lane {lanes[0]} accesses {place:#x}, {NO_TENSOR}") from None
                item = self._allocations[index]
                offsets = addresses[lanes].astype(np.int64) - item.begin
                bad = offsets + size > len(item.data)
                if np.any(bad):
                    lane, beyond = (
                        int(lanes[np.argmax(bad)]),
                        int(offsets[np.argmax(bad)]) + size - len(item.data),
                    )
                    message = f"lane {lane} accesses {size} bytes, {beyond} beyond the end of {item.name}"
                    if beyond > _FAR:
                        message = f"lane {lane} accesses {int(addresses[lane]):#x}, {NO_TENSOR}"
                    raise Fault("bounds", message) from None
                parts.append((lanes, item, offsets))
            return parts

    def read(
        self, addresses: Array, size: int, who: Threads, ordered: bool = True, early: Array | None = None
    ) -> Array:
        """``size`` bytes for each address, as (lanes, size); ``early`` lanes have not waited."""
        out = np.empty((len(addresses), size), np.uint8)
        for lanes, item, offsets in self._parts(addresses, size):
            index = offsets[:, None] + np.arange(size)
            if not np.all(item.written[index]):
                lane = int(lanes[np.argmax(~np.all(item.written[index], axis=1))])
                raise Fault("uninitialised", f"lane {lane} reads {item.name}, which nobody has written there")
            if early is not None:
                self._check_wait(item, index, lanes, early[lanes], writes=False)
            item.was_read[index] = True
            if ordered:
                those = replace(who, warps=who.warps[lanes])
                self._check_warps(item, index, those, "reads", lanes)
                self._check_blocks(item, index, those, item.writes, "reads", lanes)
                item.reads.note(index, those, self.clocks[who.block, who.block])
            out[lanes] = item.data[index]
        return out

    def write(
        self,
        addresses: Array,
        values: Array,
        who: Threads,
        ordered: bool = True,
        early: Array | None = None,
    ) -> None:
        """Store (lanes, size) bytes; of two lanes with one address the last wins, unless they differ."""
        size = values.shape[1]
        for lanes, item, offsets in self._parts(addresses, size):
            index = offsets[:, None] + np.arange(size)
            if ordered:
                those = replace(who, warps=who.warps[lanes])
                self._check_warps(item, index, those, "writes", lanes, values[lanes])
                self._check_blocks(item, index, those, item.writes, "writes", lanes)
                self._check_blocks(item, index, those, item.reads, "overwrites", lanes)
                item.writes.note(index, those, self.clocks[who.block, who.block])
            if early is not None:
                self._check_wait(item, index, lanes, early[lanes], writes=True)
            item.was_written[index] = True
            self.progress += 1
            item.data[index] = values[lanes]
            item.written[index] = True
            if np.any(item.data[index] != values[lanes]):
                raise Fault("tie", f"two lanes of one instruction write different values to {item.name}")

    @staticmethod
    def _check_wait(item: _Allocation, index: Array, lanes: Array, early: Array, writes: bool) -> None:
        met = early & item.meetings.early(index, writes)
        if np.any(met):
            verb, use = ("writes", "uses") if writes else ("reads", "writes")
            raise Fault(
                "dependent",
                f"lane {int(lanes[np.argmax(met)])} {verb} {item.name} before griddepcontrol.wait, "
                f"which the launch before {use}: {', '.join(item.meetings.names)}",
            )

    @staticmethod
    def _check_warps(
        item: _Allocation, index: Array, who: Threads, verb: str, lanes: Array, values: Array | None = None
    ) -> None:
        """A fault if another warp of the block wrote here, and nothing orders its store before this access.

        Of a store after another warp's load nothing is asked: where warps have the same elements, all load
        them and one stores the result, and the others' copies are used by nobody.
        """
        last = item.writes
        unseen = last.time[index] > who.order.seen[who.warps[:, None], last.warp[index]]
        unseen &= last.block[index] == who.block
        if values is not None:  # two warps may store the same: whichever comes last, it stands there
            unseen &= item.data[index] != values
        if np.any(unseen):
            lane = int(lanes[np.argmax(np.any(unseen, axis=1))])
            message = f"{verb} {item.name} where another warp writes, no barrier between"
            raise Fault("race", f"lane {lane} {message}")

    def _check_blocks(
        self, item: _Allocation, index: Array, who: Threads, last: _Last, verb: str, lanes: Array
    ) -> None:
        """A fault if other blocks' last accesses here need not be before this one."""
        others = last.block[index]
        foreign = (others != _NOBODY) & (others != who.block)
        if not np.any(foreign):
            return
        unseen = foreign & (last.clock[index] > self.clocks[who.block][np.where(foreign, others, 0)])
        # A store is given on with a release only if the warp that releases has seen it.
        for other in np.unique(others[foreign & ~unseen]) if last is item.writes else ():
            seen = self._releases[int(other)][self.clocks[who.block, other] - 1]
            unseen |= (others == other) & (last.time[index] > seen[last.warp[index]])
        if np.any(unseen):
            lane = int(lanes[np.argmax(np.any(unseen, axis=1))])
            other = int(others[unseen][0])
            message = f"{verb} {item.name} without an order to block {other}'s access"
            raise Fault("race", f"block {who.block}, lane {lane} {message}")

    def give_on(self, block: int, released: Array) -> Array:
        """The block's clocks for a release; ``released``: the work of its warps that ``Order`` gives on."""
        seen, earlier = released[0], self._releases.setdefault(block, [])
        earlier.append(np.maximum(seen, earlier[-1]) if earlier else seen)
        clock: Array = self.clocks[block].copy()
        self.clocks[block, block] += 1
        return clock

    def release(self, address: int, who: Threads) -> None:
        """Order what these warps have done and seen before whoever acquires from this address."""
        before = self._released.get(address)
        own = self.give_on(who.block, who.order.released(np.unique(who.warps)))
        self._released[address] = own if before is None else np.maximum(before, own)

    def acquire(self, address: int, block: int) -> None:
        """All that was released at this address is visible to the block."""
        if address in self._released:
            self.clocks[block] = np.maximum(self.clocks[block], self._released[address])


class _Elsewhere(Exception):
    def __init__(self, which: Array) -> None:
        super().__init__()
        self.which = which
