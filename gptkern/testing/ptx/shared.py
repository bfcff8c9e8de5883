"""Shared memory of a block that knows what may be read and written, by whom, and since when."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptkern.testing.ptx.arithmetic import Array
from gptkern.testing.ptx.memory import Fault
from gptkern.testing.ptx.order import Accesses, Order


class Shared:
    """A block's shared memory. What one warp writes no other may touch without an order between them.

    Args:
        size: Bytes.
        order: The order among the warps of the cluster.
        own: The block's warps among them.

    Attributes:
        guests: When each warp of the cluster that is of another block was here last.
    """

    def __init__(self, size: int, order: Order, own: slice) -> None:
        self._order, self._own = order, own
        self.data = np.zeros(size, np.uint8)
        self._written = np.zeros(size, bool)
        self.pending = np.zeros(size, bool)
        self.busy = np.zeros(size, np.int16)  # operands of running products
        self._unfenced = np.zeros(size, bool)  # written by lanes, not yet visible to the engines
        self._writer, self._write_time = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._reads = Accesses(order, size, own)
        self._atomics = Accesses(order, size, own)
        self._released: dict[int, Array] = {}
        self.guests = np.zeros(order.engine, np.int32)

    def index(self, addresses: Array, size: int, align: int | None = None) -> Array:
        """Positions of ``size`` bytes at each address, checked."""
        step = align or size
        if np.any(addresses % np.uint32(step)):
            lane = int(np.argmax(addresses % np.uint32(step) != 0))
            raise Fault("alignment", f"lane {lane} accesses {size} shared bytes at {int(addresses[lane]):#x}")
        positions = addresses.astype(np.int64)
        if np.any(positions + size > len(self.data)):
            lane = int(np.argmax(positions + size > len(self.data)))
            raise Fault(
                "bounds",
                f"lane {lane} accesses shared memory at {int(positions[lane])} of {len(self.data)} bytes",
            )
        found: Array = positions[:, None] + np.arange(size)
        return found

    # --- accesses of lanes

    def read(self, index: Array, warps: Array) -> Array:
        """The bytes at ``index`` (lanes, size), read by these warps."""
        self._check_readable(index)
        self._check_seen(index, warps, "reads shared memory that another warp writes")
        self._reads.note(index, warps)
        self._visited(warps)
        return self.data[index]

    def write(self, index: Array, values: Array, warps: Array, copied: bool = False) -> None:
        """Store (lanes, size) bytes.

        ``copied``: by ``cp.async``. The ISA asks for a fence between it and a product, as after stores, and
        Triton and CUTLASS have none there: none is asked for.
        """
        self.check_write(index, warps)
        self.data[index] = values
        self._written[index] = True
        self._writer[index] = np.broadcast_to(warps[:, None], index.shape)
        self._write_time[index] = self._order.time
        self._unfenced[index] = not copied
        self._visited(warps)
        if np.any(self.data[index] != values):
            raise Fault("tie", "two lanes of one instruction write different values to one shared address")

    def check_write(self, index: Array, warps: Array) -> None:
        """A fault if a write at this time would not be ordered after others' accesses."""
        self._check_writable(index)
        what = "writes shared memory that another warp uses"
        self._check_seen(index, warps, what)
        self._check_reads(index, warps, what)

    def update(self, index: Array, values: Array, warps: Array) -> None:
        """Store (lanes, size) bytes as atomics do, after ``read_atomically``."""
        self._check_writable(index)
        self.data[index] = values
        self._written[index] = True
        self._unfenced[index] = True

    def read_atomically(self, index: Array, warps: Array) -> Array:
        """The bytes at ``index``; others may use them at the same time, atomically as well."""
        self._check_readable(index)
        self.check_atomic(index, warps)
        return self.data[index]

    def check_atomic(self, index: Array, warps: Array) -> None:
        """A fault if an atomic access is not ordered after others' plain ones."""
        what = "uses shared memory atomically that another warp uses otherwise"
        clash = self._write_time[index] > self._order.seen[warps[:, None], self._writer[index]]
        if np.any(clash):
            raise _race(clash, what)
        self._check_reads(index, warps, what)
        self._atomics.note(index, warps)
        self._visited(warps)

    def release(self, address: int, warps: Array) -> None:
        """Order what these warps have done before whoever acquires from this address."""
        before, now = self._released.get(address), self._order.released(warps)
        self._released[address] = now if before is None else np.maximum(before, now)

    def acquire(self, address: int, warps: Array) -> None:
        """All that was released at this address is before what these warps do next."""
        if address in self._released:
            self._order.acquire(warps, self._released[address])

    # --- the copy engine and the matrix unit

    def await_write(self, index: Array, warps: Array) -> None:
        """These warps have asked for a copy to these bytes."""
        self.check_write(index, warps)
        self.pending[index] = True
        self._visited(warps)

    def deliver(self, index: Array, values: Array) -> None:
        """The copy engine's bytes arrive: whoever waits for their barrier sees them."""
        self.pending[index] = False
        self.data[index] = values
        self._written[index] = True
        self._writer[index], self._write_time[index] = self._order.engine, self._order.time
        self._unfenced[index] = False

    def read_by_engine(self, index: Array, warps: Array) -> Array:
        """The bytes at ``index`` as the matrix unit reads them for a product of these warps."""
        self._check_readable(index)
        for warp in warps:
            asking = np.full(len(index), warp)
            self._check_seen(index, asking, "of a product reads shared memory that another warp writes")
            self._reads.note(index, asking)
        if np.any(self._unfenced[index]):
            raise Fault(
                "proxy",
                "a product reads what lanes wrote to shared memory, and no fence.proxy.async stands between",
            )
        return self.data[index]

    def fence(self, warps: Array) -> None:
        """The bytes that these warps wrote are visible to the engines."""
        self._unfenced &= ~np.isin(self._writer, warps)

    # --- checks

    def _visited(self, warps: Array) -> None:
        if not self._own.start <= int(warps[0]) < self._own.stop:
            self.guests[warps] = self._order.time

    def _check_readable(self, index: Array) -> None:
        if np.any(self.pending[index]):
            raise Fault(
                "pending", f"lane {_first(self.pending[index])} reads what an asynchronous copy still writes"
            )
        if not np.all(self._written[index]):
            raise Fault(
                "uninitialised", f"lane {_first(~self._written[index])} reads shared memory nobody wrote"
            )

    def _check_writable(self, index: Array) -> None:
        if np.any(self.pending[index]):
            raise Fault(
                "pending", f"lane {_first(self.pending[index])} writes where an asynchronous copy still does"
            )
        if np.any(self.busy[index]):
            raise Fault(
                "pending", f"lane {_first(self.busy[index] > 0)} writes an operand of a running product"
            )

    def _check_seen(self, index: Array, warps: Array, what: str) -> None:
        clash = self._write_time[index] > self._order.seen[warps[:, None], self._writer[index]]
        clash |= self._atomics.unseen(index, warps)
        if np.any(clash):
            raise _race(clash, what)

    def _check_reads(self, index: Array, warps: Array, what: str) -> None:
        clash = self._reads.unseen(index, warps)
        if np.any(clash):
            raise _race(clash, what)


def _race(clash: Array, what: str) -> Fault:
    return Fault("race", f"lane {_first(clash)} {what}, no barrier between")


def _first(lanes: Any) -> int:
    return int(np.argmax(np.any(lanes, axis=1)))
