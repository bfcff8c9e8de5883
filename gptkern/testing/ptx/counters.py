"""Counts of an execution, as a profiler gives them: instructions, memory traffic, bank conflicts, products.

They are those of the compiler's text: what ptxas makes of it may differ. Global memory is counted in sectors
of 32 bytes that each request of a warp touches, beside the fewest that its distinct bytes fill. Shared memory
is counted in wavefronts: lanes go in groups that together ask for at most 128 bytes (32 lanes for up to 4
bytes each, 16 for 8, 8 for 16), and a group takes as many wavefronts as the most words that it asks of one of
the 32 banks. Atomics of one word go one after another.

Source: CUDA programming guide, "Global Memory" and "Shared Memory" of compute capability 5.x and later;
Nsight Compute documentation, "Memory Tables".
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gptkern.testing.ptx.arithmetic import Array

if TYPE_CHECKING:
    from gptkern.testing.ptx.dependent import Use
    from gptkern.testing.ptx.parse import Instruction

SECTOR, BANKS, WORD = 32, 32, 4
_WARP = 32
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
_MEMORY = {"ld": "load", "st": "store", "atom": "atomic", "red": "atomic"}
_CLASSES = {
    "matrix": ("mma", "wgmma", "tcgen05"),
    "shared load": ("ldmatrix",),
    "shared store": ("stmatrix",),
    "asynchronous copy": ("cp",),
    "barrier": ("bar", "barrier", "mbarrier", "fence", "membar", "griddepcontrol"),
    "warp exchange": ("shfl", "vote", "redux", "elect", "match", "activemask"),
    "branch": ("bra", "brx", "ret", "exit"),
    "conversion": ("cvt",),
    "move": ("mov", "selp", "prmt", "cvta", "mapa", "getctarank"),
    "special function": ("ex2", "lg2", "rsqrt", "sqrt", "rcp", "sin", "cos", "tanh"),
    "prefetch": ("prefetch",),
}
_CLASS_OF = {name: label for label, names in _CLASSES.items() for name in names}


def class_of(opcode: str) -> str:
    """The class of an instruction: ``global load``, ``float``, ``barrier``, ..."""
    parts = opcode.replace("::", "_").split(".")
    name, kind = parts[0], parts[-1]
    if any(part.endswith("wait") or part in ("wait_group", "wait_all") for part in parts):
        return "wait"
    if name in _MEMORY:
        known = ("global", "shared", "param")
        spaces = (space for part in parts for space in known if part.startswith(space))
        return f"{next(spaces, 'generic')} {_MEMORY[name]}"
    if name == "div" and kind.startswith("f"):
        return "special function"
    return _CLASS_OF.get(name) or ("float" if kind.startswith(("f", "bf")) else "integer")


@dataclass
class Access:
    """One instruction that uses memory, over all warps that executed it.

    Attributes:
        requests: Warps that executed it.
        bytes: What their lanes asked for.
        units: Sectors of global memory, or wavefronts of shared memory; ``fewest``: that would have done.
    """

    instruction: str
    source: str
    space: str
    requests: int = 0
    bytes: int = 0
    units: int = 0
    fewest: int = 0


@dataclass
class Counters:
    """The counts of one launch or of several.

    Attributes:
        instructions: By class, one for each warp that executes it.
        accesses: By instruction.
        operations: Floating-point or integer operations of matrix products, two for each multiply and add.
        read, written: Bytes of global memory that were read and written, each counted once a launch.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    accesses: dict[tuple[str, str], Access] = field(default_factory=dict)
    operations: int = 0
    read: int = 0
    written: int = 0
    launches: int = 0

    def executed(self, instruction: Instruction, warps: int) -> None:
        """An instruction was executed by so many warps."""
        opcode = instruction.opcode
        self.instructions[class_of(opcode)] += warps
        if opcode.startswith(("mma.", "wgmma.mma")):
            shape = _SHAPE.search(opcode)
            assert shape is not None
            m, n, k = map(int, shape.groups())
            self.operations += 2 * m * n * k * (warps if opcode.startswith("mma.") else warps // 4)

    def touched(
        self, instruction: Instruction, space: str, addresses: Array, size: int, lanes: Array
    ) -> None:
        """Lanes have accessed ``size`` bytes each, or the copy engine a tile for one lane."""
        key = (str(instruction), instruction.source)
        access = self.accesses.setdefault(key, Access(*key, space))
        warps = np.asarray(lanes) // _WARP
        access.requests += len(np.unique(warps))
        access.bytes += len(addresses) * size
        atomic = instruction.opcode.startswith(("atom", "red"))
        count = sectors if space == "global" else wavefronts
        units, fewest = count(np.asarray(addresses), size, np.asarray(lanes), atomic)
        access.units += units
        access.fewest += fewest

    def ended(self, uses: list[Use]) -> None:
        """A launch has ended that used these bytes of global memory."""
        self.launches += 1
        self.read += sum(int(np.count_nonzero(use.read)) for use in uses)
        self.written += sum(int(np.count_nonzero(use.written)) for use in uses)

    def total(self, space: str) -> tuple[int, int, int]:
        """(bytes, units, fewest units) over all accesses of a space."""
        those = [access for access in self.accesses.values() if access.space == space]
        return (
            sum(access.bytes for access in those),
            sum(access.units for access in those),
            sum(access.fewest for access in those),
        )


def sectors(addresses: Array, size: int, lanes: Array, atomic: bool) -> tuple[int, int]:
    """(sectors that each warp touches, the fewest that its distinct bytes fill)."""
    warps = (lanes // _WARP).astype(np.uint64)
    places = np.unique(np.stack([warps, addresses.astype(np.uint64)]), axis=1)
    first, last = places[1] // np.uint64(SECTOR), (places[1] + np.uint64(size - 1)) // np.uint64(SECTOR)
    touched = np.unique(np.stack([np.tile(places[0], 2), np.concatenate([first, last])]), axis=1)
    _, counts = np.unique(places[0], return_counts=True)
    return touched.shape[1], int(np.sum(-(-counts * size // SECTOR)))


def wavefronts(addresses: Array, size: int, lanes: Array, atomic: bool) -> tuple[int, int]:
    """(wavefronts, the fewest: what the words of each group fill when no bank is asked twice)."""
    words = max(1, size // WORD)
    within = BANKS // words  # lanes of a group
    groups = (lanes // within)[:, None].repeat(words, 1).reshape(-1).astype(np.int64)
    asked = (addresses.astype(np.int64)[:, None] // WORD + np.arange(words)).reshape(-1)
    pairs = np.stack([groups, asked])
    if not atomic:
        pairs = np.unique(pairs, axis=1)  # lanes that want one word share it
    banks, counts = np.unique(np.stack([pairs[0], pairs[1] % BANKS]), axis=1, return_counts=True)
    names, place = np.unique(banks[0], return_inverse=True)
    most = np.zeros(len(names), np.int64)
    np.maximum.at(most, place, counts)
    _, distinct = np.unique(np.unique(pairs, axis=1)[0], return_counts=True)
    return int(most.sum()), int(np.sum(-(-distinct // BANKS)))
