"""A block of threads: registers, control flow, barriers. All lanes at one instruction execute it together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gptkern.testing.ptx.arithmetic import Array
from gptkern.testing.ptx.cluster import Cluster
from gptkern.testing.ptx.counters import Counters
from gptkern.testing.ptx.flow import Order
from gptkern.testing.ptx.hopper import WARPGROUP, Barrier, Products, TensorMap, deliver
from gptkern.testing.ptx.memory import Fault, Global, Threads
from gptkern.testing.ptx.shared import Shared

if TYPE_CHECKING:
    from gptkern.testing.ptx.parse import Instruction

Mask = Array | None  # None: all lanes
Execute = Callable[["Block", Mask], None]
_WIDTHS = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# What a register holds in lanes that have not set it: NaN, or a number far away.
_UNSET = 0x7FF97FF97FF97FF9
# Rounds that warps may spin while others could go on.
_PATIENCE = 64
# Times that all may ask in vain for barriers in shared memory.
_MOST_ROUNDS = 64
_NEVER = np.iinfo(np.int64).max
# The number of the cluster's barrier among those that lanes wait at.
_CLUSTER = 1 << 16


@dataclass
class Step:
    """An instruction made ready.

    Attributes:
        kind: plain, branch, indexed (a branch by a table), return, barrier, or what is done at the cluster's
            barrier.
        yields: Another block may go on after it; ``polls``: one of the same cluster.
    """

    instruction: Instruction
    kind: str
    run: Execute | None = None
    target: int = -1
    index: Callable[[Block], Array] | None = None
    targets: Array | None = None
    yields: bool = False
    polls: bool = False


@dataclass
class CopyGroup:
    """Asynchronous copies of one ``cp.async.commit_group``."""

    lanes: Array  # those that have not waited for it
    copies: list[tuple[Array, Array, Array]] = field(default_factory=list)  # lanes, positions, bytes


class Block:
    """One block.

    Attributes:
        registers: Bits by name, one element a lane.
        choose: Chooses which warps go on where they have parted; without it those that are behind.
        warp: Each lane's warp, by its number in the cluster; ``warps``: all of the block's.
        rank: The block's number in its cluster.
    """

    def __init__(
        self,
        number: int,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        threads: int,
        steps: list[Step],
        order: Order,
        widths: Callable[[str], int],
        parameters: Array,
        memory: Global,
        cluster: Cluster,
        shared_bytes: int,
        maps: dict[int, TensorMap],
        counters: Counters | None = None,
    ) -> None:
        self.counters = counters
        self.choose: random.Random | None = None
        self.number, self.place, self.grid, self.threads = number, place, grid, threads
        self.memory, self.parameters, self.cluster = memory, parameters, cluster
        self.rank = len(cluster.members)
        cluster.members.append(self)
        self.warps = slice(self.rank * (threads // 32), (self.rank + 1) * (threads // 32))
        self.shared = Shared(shared_bytes, cluster.order, self.warps)
        self.lane = np.arange(threads, dtype=np.uint32)
        self.warp = (self.lane // 32).astype(np.int32) + np.int32(self.warps.start)
        self.registers: dict[str, Array] = {}
        self.open = CopyGroup(np.zeros(threads, bool))
        self.groups: list[CopyGroup] = []
        self.barriers: dict[int, Barrier] = {}
        self.products = [Products() for _ in range(-(-threads // WARPGROUP))]
        self.maps = maps
        self.active = np.ones(threads, bool)
        self._waited = False
        self._early = np.full(threads, memory.dependent)  # lanes that have not waited for the launches before
        self.began_dependents_early: bool | None = None  # before any lane had waited; None: not yet
        self.pc = 0
        self._steps, self._order, self._widths = steps, order, widths
        self._at = np.zeros(threads, np.int64)
        self.alive = np.ones(threads, bool)
        self._waits = np.full(threads, -1, np.int64)
        self._needed: dict[int, int] = {}  # at a barrier: threads, 0 for all
        self._came: dict[int, Array] = {}
        self._gave: dict[int, Array] = {}  # what those had done that arrive and do not wait
        self._stalled = np.zeros(threads, bool)  # lanes that asked in vain for a barrier in shared memory
        self._sought: set[int] = set()  # the barriers' addresses
        self._spins, self._rounds = 0, 0

    # --- registers

    def get(self, name: str) -> Array:
        """The bits of a register."""
        if any(
            (products.groups or products.names)
            and products.running(name)
            and np.any(self.active[group * WARPGROUP : (group + 1) * WARPGROUP])
            for group, products in enumerate(self.products)
        ):
            raise Fault("pending", f"register {name} is read while a product may still write it")
        try:
            return self.registers[name]
        except KeyError:
            raise Fault("uninitialised", f"register {name} is read before it is written") from None

    def put(self, name: str, value: Any, mask: Mask) -> None:
        """Set a register in the lanes of ``mask``."""
        if name == "_":
            return
        dtype = _WIDTHS[self._widths(name)]
        array = np.asarray(value)
        if array.dtype != dtype:
            array = (
                array.view(dtype) if array.dtype.itemsize == np.dtype(dtype).itemsize else array.astype(dtype)
            )
        if mask is None:
            self.registers[name] = array if array.shape else np.full(self.threads, array, dtype)
            return
        self.registers[name] = np.where(mask, array, self.bits_or_unset(name))

    def bits_or_unset(self, name: str) -> Array:
        """The bits of a register that need not have been set."""
        dtype = _WIDTHS[self._widths(name)]
        unset = _UNSET & int(np.iinfo(dtype).max) if dtype is not np.bool_ else False
        return self.registers.get(name, np.full(self.threads, unset, dtype))

    # --- counts

    def touched(self, home: Block | None, addresses: Array, size: int, lanes: Array) -> None:
        """Count an access of lanes to a block's shared memory, or to global memory (None)."""
        if self.counters is not None:
            space = "global" if home is None else "shared"
            self.counters.touched(self._steps[self.pc].instruction, space, addresses, size, lanes)

    def _count(self, step: Step, lanes: Mask) -> None:
        if self.counters is not None:
            count = (
                self.threads if lanes is None else np.count_nonzero(lanes.reshape(-1, 32).any(axis=1)) * 32
            )
            self.counters.executed(step.instruction, int(count) // 32)

    def those(self, lanes: Array) -> Threads:
        """These lanes, as global memory knows them."""
        return Threads(self.number, self.warp[lanes], self.cluster.order)

    # --- dependent launches

    def early(self, lanes: Array) -> Array | None:
        """Those of these lanes that have not waited for the launches before; None if all have."""
        early: Array = self._early[lanes]
        return early if np.any(early) else None

    def await_launches(self, lanes: Array) -> None:
        """``griddepcontrol.wait``: the launches before have ended for these lanes."""
        self._early[lanes] = False
        self._waited = True

    def let_dependents_start(self) -> None:
        """The next launch may begin as far as this block goes."""
        if self.began_dependents_early is None:
            self.began_dependents_early = not self._waited

    # --- asynchronous copies

    def commit(self, mask: Mask) -> None:
        """Close the group of copies."""
        self.open.lanes = np.ones(self.threads, bool) if mask is None else mask.copy()
        self.groups.append(self.open)
        self.open = CopyGroup(np.zeros(self.threads, bool))

    def wait(self, most: int, mask: Mask) -> None:
        """Let all groups but the last ``most`` arrive, for these lanes."""
        wanted = np.ones(self.threads, bool) if mask is None else mask
        newer = np.zeros(self.threads, np.int64)
        for group in reversed(self.groups):
            done = wanted & group.lanes & (newer >= most)
            newer += group.lanes
            for lanes, positions, values in group.copies:
                ready = done[lanes]
                if np.any(ready):
                    self.shared.pending[positions[ready]] = False
                    owner = lanes[ready]
                    self.shared.write(positions[ready], values[ready], self.warp[owner], owner, copied=True)
            group.lanes &= ~done
        self.groups = [group for group in self.groups if np.any(group.lanes)]

    # --- control flow

    def hold(self, lanes: Array, address: int) -> None:
        """Let others go on before these lanes ask again for a barrier in shared memory."""
        if len(lanes):
            self._stalled[lanes] = True
            self._sought.add(address)

    def resume(self) -> None:
        """Something was arrived at: whoever asked in vain may ask again."""
        self._stalled[:] = False
        self._sought.clear()
        self._rounds = 0

    def _let_arrive(self) -> None:
        """Every lane that can go on has asked in vain for a barrier in shared memory.

        All may go on once, as who does not wait would; then what is under way to one of the barriers arrives.
        """
        self._rounds += 1
        awaited = [self.barriers[at] for at in sorted(self._sought) if at in self.barriers]
        if self._rounds > 1 and any(deliver(self, barrier) for barrier in awaited):
            self.resume()
        elif self._rounds > _MOST_ROUNDS and self.cluster.alone:
            raise Fault("deadlock", "a barrier in shared memory whose phase never ends")
        self._stalled[:] = False
        self._sought.clear()  # who asked once and went on waits for nothing

    def run(self) -> Iterator[None]:
        """Execute until all lanes have returned; yields where another block may go on."""
        while np.any(self.alive):
            self._leave_cluster_barrier()
            runnable = self.alive & (self._waits < 0)
            if not np.any(runnable) and np.any(self._waits[self.alive] == _CLUSTER):
                yield
                continue
            if not np.any(runnable):
                waiting = sorted({int(barrier) for barrier in self._waits[self.alive]})
                raise Fault(
                    "deadlock", f"block {self.number}: all lanes wait at barriers {waiting}, not all came"
                )
            if np.all(self._stalled[runnable]):
                self._let_arrive()
            runnable &= ~self._stalled
            # Lanes of a warp meet again: its first go on alone. Warps that spin let others go on.
            rank = self._order.rank[self._at]
            first = np.where(runnable, rank, _NEVER).reshape(-1, 32).min(axis=1)
            places = np.unique(first[first < _NEVER])
            begin = int(places[0])
            if len(places) > 1 and self.choose is not None:
                begin = int(self.choose.choice(places))
            elif len(places) > 1 and self._spins > _PATIENCE:
                begin, self._spins = int(places[1 + self._spins % (len(places) - 1)]), 0
            mask = runnable & (rank == begin) & np.repeat(first == begin, 32)
            at = int(self._at[mask][0])
            stop = len(self._steps) if np.array_equal(mask, runnable) else int(self._order.end[at])
            yield from self._straight(at, stop, None if np.all(mask) else mask)

    def _straight(self, begin: int, stop: int, mask: Mask) -> Iterator[None]:
        """Execute from ``begin`` until lanes part or wait, or reach ``stop``."""
        everyone = np.ones(self.threads, bool) if mask is None else mask
        at = begin
        while at < stop:
            step = self._steps[at]
            self.pc = at
            guarded = self._guard(step.instruction, mask)
            some = guarded is None or bool(np.any(guarded))
            if some:
                self._count(step, guarded)
            if step.kind == "plain":
                assert step.run is not None
                if some:
                    self.active = everyone if guarded is None else guarded
                    step.run(self, guarded)
                at += 1
                if step.yields or (step.polls and not self.cluster.alone):
                    yield
                continue
            chosen = everyone if guarded is None else guarded
            if step.kind == "branch":
                alone = np.array_equal(chosen, everyone) and stop == len(self._steps)
                if alone and not np.any(self._stalled[everyone]):
                    at = step.target
                    continue
                self._spins += step.target <= at
            if step.kind == "cluster arrive":
                self.cluster.arrive(self, chosen, "relaxed" not in step.instruction.opcode)
                at += 1
                continue
            self._at[everyone] = at + 1
            self._turn(step, chosen)
            return
        self._at[everyone] = at

    def _turn(self, step: Step, chosen: Array) -> None:
        """Lanes leave the straight way: they branch, return or wait."""
        if step.kind == "branch":
            self._at[chosen] = step.target
        elif step.kind == "indexed":
            assert step.index is not None and step.targets is not None
            self._at[chosen] = step.targets[np.broadcast_to(step.index(self), self.threads)[chosen]]
        elif step.kind == "return":
            self.alive[chosen] = False
            self._release()
            if self.ended:
                self.let_dependents_start()
                self.cluster.leave(self)
        elif step.kind == "cluster wait":
            self.cluster.check_wait(self, chosen)
            self._waits[chosen] = _CLUSTER
        else:
            self._arrive(step.instruction, chosen)

    @property
    def ended(self) -> bool:
        """True when all lanes have returned."""
        return not np.any(self.alive)

    def _leave_cluster_barrier(self) -> None:
        waiting = self._waits == _CLUSTER
        if np.any(waiting):
            self._waits[self.cluster.through(self, waiting)] = -1

    def _guard(self, instruction: Instruction, mask: Mask) -> Mask:
        if instruction.predicate is None:
            return mask
        value = self.get(instruction.predicate)
        if instruction.negated:
            value = ~value
        guarded: Array = value if mask is None else mask & value
        return None if np.all(guarded) else guarded

    def _arrive(self, instruction: Instruction, lanes: Array) -> None:
        operands = [self._number(operand) for operand in instruction.operands]
        barrier, count = operands[0], operands[1] if len(operands) > 1 else 0
        came = self._came.setdefault(barrier, np.zeros(self.threads, bool))
        came |= lanes
        if ".arrive" in instruction.opcode:
            before, now = self._gave.get(barrier), self.cluster.order.released(np.unique(self.warp[lanes]))
            self._gave[barrier] = now if before is None else np.maximum(before, now)
        else:
            self._waits[lanes] = barrier
        self._needed[barrier] = count
        self._release()

    def _number(self, operand: str) -> int:
        if operand[0] != "%":
            return int(operand, 0)
        values = np.unique(self.get(operand))
        if len(values) != 1:
            raise Fault("barrier", f"threads name different barriers: {values.tolist()}")
        return int(values[0])

    def _release(self) -> None:
        """Let those go on at whose barrier all have come."""
        for barrier, wanted in list(self._needed.items()):
            came = self._came[barrier]
            needed = wanted or int(np.count_nonzero(self.alive))
            if np.any(came) and np.count_nonzero(came) >= needed:
                warps = np.unique(self.warp[self._waits == barrier])
                self.cluster.order.join(warps)
                # Who comes after one that has waited for the launches before comes after them.
                if not np.all(self._early[came]):
                    self._early[self._waits == barrier] = False
                if barrier in self._gave:
                    self.cluster.order.acquire(warps, self._gave.pop(barrier))
                self._waits[self._waits == barrier] = -1
                came[:] = False
