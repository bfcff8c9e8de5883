"""Operands of instructions: each as a function of a block that gives one element a lane, or one for all."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gptkern.testing.ptx.arithmetic import DTYPES, Array
from gptkern.testing.ptx.parse import Program, split

if TYPE_CHECKING:
    from gptkern.testing.ptx.block import Block, Mask

Fetch = Callable[["Block"], Any]
ADDRESS = re.compile(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
# The generic address at which parameter memory begins: no tensor lies there.
PARAMETER_MEMORY = 1 << 60


def lanes_of(block: Block, mask: Mask) -> Array:
    """The numbers of the lanes that take part."""
    return np.arange(block.threads) if mask is None else np.flatnonzero(mask)


class Operands:
    """The operands of a program's instructions."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._parameters = {parameter.name: parameter for parameter in program.parameters}

    def value(self, operand: str, kind: str) -> Fetch:
        """An operand as an array of the type, one element a lane or one for all."""
        dtype = DTYPES[kind]
        special = self._special(operand)
        if special is not None:
            return lambda block: np.asarray(special(block)).astype(dtype)
        if operand[0] == "%" or operand in self.program.registers:
            width = np.dtype(dtype).itemsize

            def register(block: Block) -> Array:
                bits = block.get(operand)
                if bits.dtype.itemsize == width:
                    return bits.view(dtype)
                return bits.astype(DTYPES[f"u{8 * width}"]).view(dtype)

            return register
        constant = self._constant(operand, dtype)
        return lambda block: constant

    def _constant(self, operand: str, dtype: Any) -> Any:
        if operand in self.program.shared:
            return dtype(self.program.shared[operand])
        if operand in self._parameters:
            return dtype(PARAMETER_MEMORY + self._parameters[operand].offset)
        if operand.startswith(("0f", "0F")):
            return np.frombuffer(struct.pack("<I", int(operand[2:], 16)), np.float32)[0]
        if operand.startswith(("0d", "0D")):
            return np.frombuffer(struct.pack("<Q", int(operand[2:], 16)), np.float64)[0]
        try:
            number = int(operand.rstrip("U"), 0)
        except ValueError:
            raise NotImplementedError(f"the operand {operand}") from None
        if dtype is np.bool_:
            return np.bool_(number)
        bits = 8 * np.dtype(dtype).itemsize
        return np.array(number & ((1 << bits) - 1), dtype=f"u{bits // 8}").view(dtype)[()]

    @staticmethod
    def _special(operand: str) -> Fetch | None:
        axis = "xyz".find(operand[-1])
        table: dict[str, Fetch] = {
            "%tid": lambda block: block.lane if axis == 0 else 0,
            "%ntid": lambda block: block.threads if axis == 0 else 1,
            "%ctaid": lambda block: block.place[axis],
            "%nctaid": lambda block: block.grid[axis],
            "%cluster_nctaid": lambda block: block.cluster.shape[axis],
            "%cluster_ctaid": lambda block: block.place[axis] % block.cluster.shape[axis],
            "%nclusterid": lambda block: block.grid[axis] // block.cluster.shape[axis],
            "%clusterid": lambda block: block.place[axis] // block.cluster.shape[axis],
        }
        if operand[:-2] in table and axis >= 0:
            return table[operand[:-2]]
        if operand == "%cluster_ctarank":
            return lambda block: block.rank
        if operand == "%cluster_nctarank":
            return lambda block: len(block.cluster.members)
        if operand == "%laneid":
            return lambda block: block.lane % np.uint32(32)
        if operand == "%warpid":
            return lambda block: block.lane // np.uint32(32)
        return None

    def _address(self, operand: str, kind: str) -> Fetch:
        found = ADDRESS.fullmatch(operand)
        if found is None:
            raise NotImplementedError(f"the address {operand}")
        base, offset = found.groups()
        fetch, dtype = self.value(base, kind), DTYPES[kind]
        bits = 8 * np.dtype(dtype).itemsize
        more = dtype(int(offset or "0", 0) & ((1 << bits) - 1))
        return lambda block: np.broadcast_to(fetch(block) + more, block.threads)

    @staticmethod
    def _vector(operand: str) -> tuple[str, ...]:
        return split(operand.strip()[1:-1]) if operand[0] == "{" else (operand,)
