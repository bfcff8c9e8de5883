"""Clusters: blocks that share a barrier and reach each other's shared memory.

A generic address of shared memory is ``WINDOW`` and an offset in the block's own, or an offset and, above it,
the rank of a block of the cluster and one. A 32-bit address in the cluster's window is the same without
``WINDOW``.

Source: PTX ISA 8.8, "State Spaces", "mapa", "barrier.cluster", "st.async".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gptkern.testing.ptx.arithmetic import Array
from gptkern.testing.ptx.memory import Fault, Global
from gptkern.testing.ptx.order import Order

if TYPE_CHECKING:
    from gptkern.testing.ptx.block import Block

WINDOW = 1 << 56
RANK_SHIFT = 24
_OFFSET = (1 << RANK_SHIFT) - 1


class Cluster:
    """The blocks of a cluster and the barrier among all their threads.

    Args:
        shape: Blocks along x, y, z.
        threads: Threads of a block.
    """

    def __init__(self, shape: tuple[int, int, int], threads: int, memory: Global) -> None:
        self.shape = shape
        size = shape[0] * shape[1] * shape[2]
        warps = threads // 32
        self.order, self.memory = Order(size * warps), memory
        self.members: list[Block] = []
        self._arrived = np.zeros((size, threads), bool)
        self._phase = 0
        self._joined = np.zeros((size, threads), np.int64)  # the phase that a thread arrived in last, and one
        self._waited = np.zeros((size, threads), np.int64)
        nothing = np.zeros((2, warps * size + 1), np.int32), np.zeros(len(memory.clocks), np.int64)
        self._gathered, self._visible = nothing, nothing

    @property
    def alone(self) -> bool:
        """True where the cluster is a single block."""
        return len(self.members) == 1

    def member(self, block: Block, rank: int) -> Block:
        """A block of the cluster whose shared memory ``block`` may use now.

        Raises:
            Fault: It has ended, it need not have begun, or there is none.
        """
        if rank >= len(self.members):
            raise Fault("bounds", f"block {rank} of a cluster of {len(self.members)}")
        found = self.members[rank]
        if found is block:
            return block
        if found.ended:
            raise Fault("ended", f"shared memory of block {found.place}, which has ended")
        if not np.any(self.order.seen[block.warps, found.warps]):
            raise Fault(
                "race", f"shared memory of block {found.place}, of which nothing says that it has begun"
            )
        return found

    # --- the barrier

    def arrive(self, block: Block, lanes: Array, releases: bool) -> None:
        """These lanes of a block arrive."""
        row = block.rank
        if np.any(self._joined[row][lanes] > self._waited[row][lanes]):
            raise Fault("barrier", "a thread arrives at the cluster's barrier again before it has waited")
        self._joined[row][lanes] = self._phase + 1
        self._arrived[row][lanes] = True
        if releases:
            seen = self.order.released(np.unique(block.warp[lanes]))
            clock = self.memory.give_on(block.number, seen)
            self._gathered = np.maximum(self._gathered[0], seen), np.maximum(self._gathered[1], clock)
        self.settle()

    def check_wait(self, block: Block, lanes: Array) -> None:
        """A fault if a lane waits that has not arrived."""
        if np.any(self._joined[block.rank][lanes] <= self._waited[block.rank][lanes]):
            raise Fault("barrier", "a thread waits at the cluster's barrier at which it has not arrived")

    def settle(self) -> None:
        """Begin the next phase if all threads that have not ended have arrived."""
        alive = np.stack([member.alive for member in self.members])
        if np.any(alive & ~self._arrived) or not np.any(self._arrived):
            return
        self._phase += 1
        self._arrived[:] = False
        self._visible = self._gathered
        self.memory.progress += 1

    def through(self, block: Block, lanes: Array) -> Array:
        """Those of these waiting lanes that need wait no more."""
        row = block.rank
        free = lanes & (self._joined[row] <= self._phase)
        if np.any(free):
            self._waited[row][free] = self._joined[row][free]
            self.order.acquire(np.unique(block.warp[free]), self._visible[0])
            clocks = self.memory.clocks
            clocks[block.number] = np.maximum(clocks[block.number], self._visible[1])
        return np.asarray(free)

    def leave(self, block: Block) -> None:
        """A block ends. A fault if another may still use its shared memory, or a copy is under way to it."""
        for barrier in block.barriers.values():
            if barrier.tiles:
                raise Fault("ended", "the block ends while a copy into its shared memory is under way")
        known = self.order.seen[block.warps].max(axis=0)[:-1]
        late = np.flatnonzero(block.shared.guests > known)
        if len(late):
            guest = self.members[int(late[0]) // (block.threads // 32)]
            raise Fault("ended", f"the block ends while block {guest.place} may use its shared memory")
        self.settle()


def parts_of(block: Block, addresses: Array, remote: bool) -> list[tuple[Block, Array, Array]]:
    """(the block, which of the addresses, offsets) for addresses of shared memory without ``WINDOW``.

    Raises:
        Fault: An address is in another block's, and ``remote`` is false.
    """
    ranks = addresses >> addresses.dtype.type(RANK_SHIFT)
    everything = np.arange(len(addresses))
    if not np.any(ranks):
        return [(block, everything, addresses.astype(np.uint32))]
    found = []
    for rank in np.unique(ranks):
        lanes = everything[ranks == rank]
        home = block if rank == 0 else block.cluster.member(block, int(rank) - 1)
        if home is not block and not remote:
            raise Fault("bounds", f"lane {lanes[0]} accesses another block's shared memory as its own")
        found.append((home, lanes, (addresses[lanes] & addresses.dtype.type(_OFFSET)).astype(np.uint32)))
    return found
