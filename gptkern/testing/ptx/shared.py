"""Shared memory of a block that knows what may be read and written, by whom, and since when.

Between warps every access counts. Between the lanes of one warp, of each byte the last store and the loads of
the warp that loaded it last: until the warp meets (``bar.warp.sync``, or whatever orders warps) no other lane
may store there, or load what was stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptkern.testing.ptx.arithmetic import Array
from gptkern.testing.ptx.memory import Fault
from gptkern.testing.ptx.order import Accesses, Order

# In place of a lane's number: the whole warp at once, or several of its lanes.
_WHOLE, _SEVERAL = 32, 63


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
        self._by_lanes = np.zeros(size, bool)  # of which the engines know after a fence alone
        self._writer, self._write_time = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._reads = Accesses(order, size, own)
        self._engine_reads = Accesses(order, size, own)
        self._atomics = Accesses(order, size, own)
        self._stored, self._loaded = np.zeros(size, np.int64), np.zeros(size, np.int64)  # tags of lanes
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

    def read(self, index: Array, warps: Array, lanes: Array | None = None) -> Array:
        """The bytes at ``index`` (lanes, size), read by these lanes of warps, or by the warps as a whole."""
        self._check_readable(index)
        self._check_seen(index, warps, "reads shared memory that another warp writes")
        self._reads.note(index, warps)
        tags = self._tags(warps, lanes)
        self._check_lanes(
            self._stored[index], tags, "reads shared memory that another lane of its warp writes"
        )
        # Where several lanes of a warp load one byte, now or since the warp met, they count as all.
        several = self._of_other_lanes(self._loaded[index], tags)
        self._loaded[index] = tags
        several |= self._loaded[index] != tags
        if np.any(several):
            self._loaded[index[several]] = np.broadcast_to(tags | _SEVERAL, index.shape)[several]
        self._visited(warps)
        return self.data[index]

    def write(
        self, index: Array, values: Array, warps: Array, lanes: Array | None = None, copied: bool = False
    ) -> None:
        """Store (lanes, size) bytes, from these lanes of warps, or from the warps as a whole.

        ``copied``: by ``cp.async``. The ISA asks for a fence between it and a product, as after stores, and
        Triton and CUTLASS have none there: none is asked for.
        """
        self.check_write(index, warps)
        tags = self._tags(warps, lanes)
        for before in (self._stored, self._loaded):
            self._check_lanes(before[index], tags, "writes shared memory that another lane of its warp uses")
        self._stored[index] = tags
        self.data[index] = values
        self._written[index] = True
        self._writer[index] = np.broadcast_to(warps[:, None], index.shape)
        self._write_time[index] = self._order.time
        self._by_lanes[index] = not copied
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

    def await_tile(self, index: Array, warps: Array) -> None:
        """These warps have asked for a copy to these bytes by the copy engine."""
        self.await_write(index, warps)
        self.check_fenced(index, warps, "the copy engine writes where lanes wrote to shared memory")
        if np.any(self._reads.unseen(index, warps, fenced=True)):
            raise Fault(
                "proxy",
                "the copy engine writes where lanes read shared memory, no fence.proxy.async between",
            )

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
        self._by_lanes[index] = False
        self._stored[index] = 0

    def read_by_engine(self, index: Array, warps: Array) -> Array:
        """The bytes at ``index`` as the matrix unit reads them for a product of these warps."""
        self._check_readable(index)
        for warp in warps:
            asking = np.full(len(index), warp)
            self._check_seen(index, asking, "of a product reads shared memory that another warp writes")
            self.check_fenced(index, asking, "a product reads what lanes wrote to shared memory")
            self._engine_reads.note(index, asking)
        return self.data[index]

    def check_fenced(self, index: Array, warps: Array, what: str) -> None:
        """A fault if lanes stored these bytes, and an engine at work for these warps need not know of it."""
        late = self._write_time[index] > self._order.fenced[warps[:, None], self._writer[index]]
        if np.any(late & self._by_lanes[index]):
            raise Fault("proxy", f"{what}, and no fence.proxy.async stands between")

    def fence_barrier(self, index: Array) -> None:
        """The making of an mbarrier is visible to the engines (``fence.mbarrier_init``)."""
        self._by_lanes[index] = False

    # --- checks

    def _tags(self, warps: Array, lanes: Array | None) -> Array:
        """(lanes, 1): who accesses and when: the warp's epoch, the warp, the lane."""
        epoch = self._order.epoch[warps] * len(self._order.epoch) + warps
        lane = _WHOLE if lanes is None else lanes % 32
        return np.asarray(epoch * 64 + lane)[:, None]

    @staticmethod
    def _of_other_lanes(before: Array, tags: Array) -> Array:
        """True where other lanes of the same warp accessed a byte, and the warp has not met since."""
        return np.asarray((before >> 6 == tags >> 6) & ((before != tags) | (tags & 63 == _WHOLE)))

    def _check_lanes(self, before: Array, tags: Array, what: str) -> None:
        clash = self._of_other_lanes(before, tags)
        if np.any(clash):
            raise Fault("race", f"lane {_first(clash)} {what}, no bar.warp.sync between")

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
        clash = self._reads.unseen(index, warps) | self._engine_reads.unseen(index, warps)
        if np.any(clash):
            raise _race(clash, what)


def _race(clash: Array, what: str) -> Fault:
    return Fault("race", f"lane {_first(clash)} {what}, no barrier between")


def _first(lanes: Any) -> int:
    return int(np.argmax(np.any(lanes, axis=1)))
