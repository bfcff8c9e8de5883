"""The order of warps: whose work is before whose, by vector clocks.

Every access to shared memory has a time. A warp sees another's work up to the time at which the other gave
it on: at a barrier of the block or the cluster, with an arrival at an mbarrier, by a release and an acquire.
The engines see less: what was seen by a warp that executed ``fence.proxy.async`` and has given that on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gptkern.testing.ptx.arithmetic import Array

_EVER = np.iinfo(np.int32).max


class Order:
    """The order among the warps of a cluster, which is a block alone where there are no clusters.

    Attributes:
        engine: The number of the copy engine among the warps: the last.
        seen: (warps, warps): the time up to which a warp, the row, sees another's work; all of its own.
        fenced: (warps, warps): the same through a fence, its own work included.
        time: What is accessed now has this time.
        epoch: (warps): counts the points at which the lanes of a warp see each other's work.
    """

    def __init__(self, warps: int) -> None:
        self.engine = warps
        self._known = np.zeros((2, warps + 1, warps + 1), np.int32)
        self.seen, self.fenced = self._known
        np.fill_diagonal(self.seen, _EVER)
        self.time = 1
        self.epoch = np.ones(warps + 1, np.int64)

    def released(self, warps: Array) -> Array:
        """The work that these warps have seen and done so far, by warp: (2, warps), whole and through fences.

        Whatever they do next is later.
        """
        result: Array = self._known[:, warps].max(axis=1)
        result[0, warps] = self.time
        self.time += 1
        return result

    def acquire(self, warps: Array, released: Array) -> None:
        """These warps see what was released. What one of their lanes sees counts as seen by all."""
        self._known[:, warps] = np.maximum(self._known[:, warps], released[:, None])
        self.meet(warps)

    def meet(self, warps: Array) -> None:
        """The lanes of each of these warps see each other's work."""
        self.epoch[warps] += 1

    def fence(self, warps: Array) -> None:
        """A fence of these warps: the engines see what they see and did, for whoever comes after it."""
        now = np.minimum(self.seen[warps], self.time)
        self.fenced[warps] = np.maximum(self.fenced[warps], now)
        self.time += 1

    def join(self, warps: Array) -> None:
        """A barrier of these warps: each sees what all did before."""
        self.acquire(warps, self.released(warps))


@dataclass
class _Times:
    """The last time at which each of some warps accessed a byte."""

    warps: slice
    each: Array  # (warps, bytes)
    last: Array  # (bytes): of any of them

    def note(self, index: Array, warps: Array, time: int) -> None:
        self.each[(warps - self.warps.start)[:, None], index] = time
        self.last[index] = time

    def unseen(self, index: Array, warps: Array, seen: Array) -> Array:
        own = seen[:, self.warps]
        found = self.last[index] > own.min(axis=1)[warps][:, None]
        if np.any(found):  # some warp may not have been seen: look at each
            lanes, places = np.nonzero(found)
            each = own[warps[lanes]] < self.each[:, index[lanes, places]].T
            found[lanes, places] = np.any(each, axis=1)
        return np.asarray(found)


@dataclass
class Accesses:
    """Accesses of one kind to a block's shared memory, by byte and warp.

    Attributes:
        own: The block's warps. Those of other blocks of the cluster are counted apart: they come seldom.
    """

    order: Order
    size: int
    own: slice
    _ours: _Times = field(init=False)
    _guests: _Times | None = None

    def __post_init__(self) -> None:
        self._ours = self._times(self.own)

    def _times(self, warps: slice) -> _Times:
        count = warps.stop - warps.start
        return _Times(warps, np.zeros((count, self.size), np.int32), np.zeros(self.size, np.int32))

    def note(self, index: Array, warps: Array) -> None:
        """These warps, all of one block, access (lanes, size) bytes now."""
        if self.own.start <= int(warps[0]) < self.own.stop:
            self._ours.note(index, warps, self.order.time)
            return
        if self._guests is None:
            self._guests = self._times(slice(0, self.order.engine))
        self._guests.note(index, warps, self.order.time)

    def unseen(self, index: Array, warps: Array, fenced: bool = False) -> Array:
        """(lanes, size): True where another warp accessed the byte and the lane's warp need not know.

        ``fenced``: where any warp did, and no fence is known to stand between.
        """
        known = self.order.fenced if fenced else self.order.seen
        found = self._ours.unseen(index, warps, known)
        if self._guests is not None:
            found |= self._guests.unseen(index, warps, known)
        return found
