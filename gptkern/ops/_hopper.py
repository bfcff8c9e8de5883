"""Launches of Hopper's kernels in Gluon: the calls that they can serve at all, and the tiles of products."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _launch
from gptkern.ops._device_hopper import BLOCK_M, BLOCK_N, ROWS
from gptkern.ops._dispatch import INTERPRETED
from gptkern.ops._gluon import descriptor

# Rows and columns of a product's tile.
TILE_M, TILE_N = int(BLOCK_M.value), int(BLOCK_N.value)


def runs_gluon(x: torch.Tensor) -> bool:
    """True if ``x`` is in half precision on a Hopper GPU, and its kernels are compiled."""
    if INTERPRETED and x.device.type == "cpu":  # the interpreter does not know Gluon
        return False
    return 90 <= _launch.arch(x.device) < 100 and x.dtype in (torch.float16, torch.bfloat16)


def aligned(x: torch.Tensor) -> bool:
    """True if the copy engine and wide loads can read ``x``: contiguous one way, 16-byte steps the other."""
    inner = 1 if x.stride(1) == 1 else 0
    step = x.stride(1 - inner) * x.element_size()
    return x.stride(inner) == 1 and step > 0 and step % 16 == 0 and x.numel() > 0 and x.data_ptr() % 16 == 0


def tiles(m: int, n: int) -> int:
    """The tiles of an (m, n) result."""
    return -(-m // TILE_M) * -(-n // TILE_N)


def multiply(
    kernel: Any,
    row: dict[str, Any],
    m: int,
    n: int,
    operands: tuple[torch.Tensor, torch.Tensor],
    *args: Any,
    a_rows: bool = True,
    copies: int = 1,
    splits: int = 1,
    **flags: Any,
) -> None:
    """Launch a product's kernel: a program for each tile, and at most one for each multiprocessor.

    Args:
        row: The launch row.
        m, n: The result's extents, of all ``copies`` together.
        operands: A, or without ``a_rows`` its transpose, and B, by rows or by columns.
        args: The arguments after the operands' maps.
        copies, splits: As in ``_device_hopper.Product``.
        flags: The kernel's flags beside the row's.
    """
    a, b = operands
    block_k, width = row["BLOCK_K"], TILE_N // copies
    rows = [ROWS.value, block_k] if a_rows else [block_k, ROWS.value]
    columns = [block_k, width] if b.stride(1) == 1 else [width, block_k]
    _launch.launch(
        kernel,
        (min(tiles(m, n) * splits, _launch.multiprocessors(a.device)),),
        descriptor(a, rows),
        descriptor(b if b.stride(1) == 1 else b.t(), columns),
        *args,
        **flags,
        **row,
    )
