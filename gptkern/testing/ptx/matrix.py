"""Instructions of a whole warp: matrix products, matrix loads, shuffles. Arrays are (warps, 32).

Source of the layouts: PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions", version 8.8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptkern.testing.ptx.arithmetic import Array, from_bf16, from_fp8

WARP = 32
_LANE = np.arange(WARP)
_GROUP, _THREAD = _LANE >> 2, _LANE & 3


def elements(registers: Array, kind: str) -> Array:
    """The elements that 32-bit registers hold, lowest first: (..., registers) to (..., registers * count)."""
    flat = np.ascontiguousarray(registers.astype(np.uint32))
    if kind == "tf32":
        return (flat & np.uint32(0xFFFFE000)).view(np.float32)
    if kind in ("bf16", "f16"):
        halves = flat.view(np.uint16)
        return from_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)
    octets = flat.view(np.uint8)
    if kind in ("e4m3", "e5m2"):
        return from_fp8(octets, kind)
    return octets.view(np.int8) if kind == "s8" else octets


def _operand_places(k: int, per: int) -> tuple[Array, Array, Array, Array]:
    """(row, column) of A's elements and (k, n) of B's by (lane, element); ``per`` elements a register."""
    half = k // 2
    within = np.arange(per)
    columns = _THREAD[:, None] * per + within
    # A: registers 0 and 1 are rows g and g + 8 of the first half of k, 2 and 3 of the second.
    rows = np.concatenate(
        [np.broadcast_to(_GROUP[:, None] + 8 * (r & 1), (WARP, per)) for r in range(4)], axis=1
    )
    cols = np.concatenate([columns + half * (r >> 1) for r in range(4)], axis=1)
    depth = np.concatenate([columns, columns + half], axis=1)
    return rows, cols, depth, np.broadcast_to(_GROUP[:, None], depth.shape)


def product(a: Array, b: Array, c: Array, k: int, kinds: tuple[str, str], integer: bool) -> Array:
    """``mma.m16n8k..``: A of 4 registers, B of 2, C and D of 4: (warps, 32, registers).

    A shape whose A has 2 registers holds the first half of k alone.
    """
    per = {"tf32": 1, "bf16": 2, "f16": 2}.get(kinds[0], 4)
    whole = 8 * per
    rows, cols, depth, columns = _operand_places(whole, per)
    count = a.shape[-1] * per
    left = np.zeros((len(a), 16, whole))
    right = np.zeros((len(a), whole, 8))
    left[:, rows[:, :count], cols[:, :count]] = elements(a, kinds[0])
    used = b.shape[-1] * per
    right[:, depth[:, :used], columns[:, :used]] = elements(b, kinds[1])
    accumulated = np.empty((len(a), 16, 8))
    out_rows = np.stack([_GROUP, _GROUP, _GROUP + 8, _GROUP + 8], axis=1)
    out_columns = np.stack([2 * _THREAD, 2 * _THREAD + 1] * 2, axis=1)
    accumulated[:, out_rows, out_columns] = c.view(np.int32) if integer else c.view(np.float32)
    total = left @ right + accumulated
    done = total[:, out_rows, out_columns]
    return (
        done.astype(np.int64).astype(np.int32).view(np.uint32)
        if integer
        else done.astype(np.float32).view(np.uint32)
    )


def gathered(rows: Array, count: int, transposed: bool) -> Array:
    """``ldmatrix``: rows (warps, 8 * count, 16 bytes) as registers (warps, 32, count)."""
    matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(len(rows), count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    pairs = np.ascontiguousarray(matrices).view(np.uint32)  # (warps, count, 8, 4)
    return pairs.reshape(len(rows), count, WARP).swapaxes(1, 2)


def scattered(registers: Array, transposed: bool) -> Array:
    """``stmatrix``: registers (warps, 32, count) as rows (warps, 8 * count, 16 bytes)."""
    warps, _, count = registers.shape
    pairs = np.ascontiguousarray(registers.swapaxes(1, 2)).reshape(warps, count, 8, 4)
    matrices = pairs.view(np.uint16)  # (warps, count, 8, 8)
    if transposed:
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
    return matrices.reshape(warps, 8 * count, 8).view(np.uint8)


def shuffle_source(mode: str, by: Array, clamp: Array) -> tuple[Array, Array]:
    """(the lane that each lane reads, whether it is in range) of ``shfl.sync``."""
    segment = (clamp >> 8) & 31
    limit = clamp & 31
    most = (_LANE & segment) | (limit & ~segment & 31)
    by = by & 31
    if mode == "bfly":
        lane = _LANE ^ by
        inside = lane <= most
    elif mode == "idx":
        lane = (_LANE & segment) | (by & ~segment & 31)
        inside = lane <= most
    elif mode == "up":
        lane = _LANE - by
        inside = lane >= most
    else:
        lane = _LANE + by
        inside = lane <= most
    return np.where(inside, lane, _LANE), inside


REDUCTIONS: dict[str, Any] = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
