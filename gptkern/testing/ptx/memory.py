"""Memory that knows what may be read and written, by whom, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gptkern.testing.ptx.arithmetic import Array
from gptkern.testing.ptx.dependent import Meetings, Use

_NOBODY = -1


class Fault(Exception):
    """Something that a GPU would not forgive, or would forgive only sometimes.

    Attributes:
        check: The check that found it: bounds, alignment, uninitialised, pending, race, deadlock, ...
    """

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


@dataclass
class _Allocation:
    begin: int
    name: str
    data: Array
    written: Array
    writer: Array  # the block that wrote a byte last, and its clock then
    write_clock: Array
    reader: Array
    read_clock: Array
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
        self._released: dict[int, Array] = {}
        self.progress = 0  # by which a scheduler sees that something goes on

    def _allocation(
        self, union: list[tuple[int, int, str]], tensors: dict[str, torch.Tensor], fresh: set[str]
    ) -> _Allocation:
        begin, end = union[0][0], max(end for _, end, _ in union)
        written = np.zeros(end - begin, bool)
        for first, last, name in union:
            written[first - begin : last - begin] |= name not in fresh
        nobody = [np.full(end - begin, _NOBODY, np.int32) for _ in range(2)]
        clocks = [np.zeros(end - begin, np.int64) for _ in range(2)]
        data = _memory(tensors[union[0][2]], begin, end)
        names = ", ".join(name for _, _, name in union)
        return _Allocation(
            begin, names, data, written, nobody[0], clocks[0], nobody[1], clocks[1],
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
                    raise Fault("bounds", f"lane {lanes[0]} accesses {int(addresses[lanes[0]]):#x}") from None
                item = self._allocations[index]
                offsets = addresses[lanes].astype(np.int64) - item.begin
                bad = offsets + size > len(item.data)
                if np.any(bad):
                    lane, beyond = (
                        int(lanes[np.argmax(bad)]),
                        int(offsets[np.argmax(bad)]) + size - len(item.data),
                    )
                    message = f"lane {lane} accesses {size} bytes, {beyond} beyond the end of {item.name}"
                    raise Fault("bounds", message) from None
                parts.append((lanes, item, offsets))
            return parts

    def read(
        self, addresses: Array, size: int, block: int, ordered: bool = True, early: Array | None = None
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
                self._check_order(item, index, block, item.writer, item.write_clock, "reads", lanes)
                item.reader[index], item.read_clock[index] = block, self.clocks[block, block]
            out[lanes] = item.data[index]
        return out

    def write(
        self,
        addresses: Array,
        values: Array,
        block: int,
        ordered: bool = True,
        early: Array | None = None,
    ) -> None:
        """Store (lanes, size) bytes; of two lanes with one address the last wins, unless they differ."""
        size = values.shape[1]
        for lanes, item, offsets in self._parts(addresses, size):
            index = offsets[:, None] + np.arange(size)
            if ordered:
                self._check_order(item, index, block, item.writer, item.write_clock, "writes", lanes)
                self._check_order(item, index, block, item.reader, item.read_clock, "overwrites", lanes)
                item.writer[index], item.write_clock[index] = block, self.clocks[block, block]
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

    def _check_order(
        self, item: _Allocation, index: Array, block: int, who: Array, when: Array, verb: str, lanes: Array
    ) -> None:
        others, clocks = who[index], when[index]
        foreign = (others != _NOBODY) & (others != block)
        if not np.any(foreign):
            return
        unseen = foreign & (clocks > self.clocks[block][np.where(foreign, others, 0)])
        if np.any(unseen):
            lane = int(lanes[np.argmax(np.any(unseen, axis=1))])
            other = int(others[unseen][0])
            raise Fault(
                "race",
                f"block {block}, lane {lane} {verb} {item.name} without an order to block {other}'s access",
            )

    def release(self, address: int, block: int) -> None:
        """The block's work so far is visible to whoever acquires from this address."""
        seen = self._released.get(address)
        own = self.clocks[block].copy()
        self._released[address] = own if seen is None else np.maximum(seen, own)
        self.clocks[block, block] += 1

    def acquire(self, address: int, block: int) -> None:
        """All that was released at this address is visible to the block."""
        if address in self._released:
            self.clocks[block] = np.maximum(self.clocks[block], self._released[address])


class _Elsewhere(Exception):
    def __init__(self, which: Array) -> None:
        super().__init__()
        self.which = which
