"""Launches of the product's kernel for Hopper: the calls that it serves, its tensor maps, its grid."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _launch
from gptkern.ops._gluon import descriptor
from gptkern.ops._hopper import runs_gluon
from gptkern.ops.linear.kernels_hopper import BLOCK_M, BLOCK_N, ROWS, linear_hopper


def aligned(x: torch.Tensor) -> bool:
    """True if the copy engine and wide loads can read ``x``: contiguous one way, 16-byte steps the other."""
    inner = 1 if x.stride(1) == 1 else 0
    step = x.stride(1 - inner) * x.element_size()
    return x.stride(inner) == 1 and step > 0 and step % 16 == 0 and x.numel() > 0 and x.data_ptr() % 16 == 0


def _row(device: torch.device) -> dict[str, Any]:
    return _launch.config("linear_hopper", device)


def _tiles(m: int, n: int) -> int:
    return -(-m // int(BLOCK_M.value)) * -(-n // int(BLOCK_N.value))


def serves(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> bool:
    """True if the kernel computes ``a @ b`` on a's device: long sums, and a tile for each multiprocessor.

    Fewer tiles are left to the other kernel, whose smaller ones fill the GPU better. A row's bits are the
    same: both kernels add up the same chain of products.
    """
    if not (runs_gluon(a) and aligned(a) and aligned(b)):
        return False
    wide = bias is None or bias.stride(0) == 1, residual is None or residual.stride(1) == 1
    if a.stride(1) != 1 or not all(wide):
        return False
    row = _row(a.device)
    long = a.shape[1] >= row["STAGES"] * row["BLOCK_K"]
    return long and _tiles(a.shape[0], b.shape[1]) >= _launch.multiprocessors(a.device)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str,
    *,
    gated: bool = False,
) -> None:
    """Launch the kernel; ``out`` and ``pre`` are contiguous.

    With ``gated`` b and the bias are the gate's columns and then those of up, as ``pre`` is.
    """
    row = _row(a.device)
    (m, k), columns = a.shape, b.shape[1]
    copies = 2 if gated else 1
    b_rows = b.stride(1) == 1
    block_n, block_k = BLOCK_N.value // copies, row["BLOCK_K"]
    _launch.launch(
        linear_hopper,
        (min(_tiles(m, columns), _launch.multiprocessors(a.device)),),
        descriptor(a, [ROWS.value, block_k]),
        descriptor(b, [block_k, block_n]) if b_rows else descriptor(b.t(), [block_n, block_k]),
        *(bias, residual, out, pre, m, columns // copies, k),
        0 if residual is None else residual.stride(0),
        ACTIVATION=activation,
        B_ROWS=b_rows,
        GATED=gated,
        **row,
    )
