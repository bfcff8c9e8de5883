"""Launches of the products' kernels for Hopper: the calls that they serve, and their arguments."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _launch
from gptkern.ops._device_hopper import ROWS
from gptkern.ops._hopper import TILE_M, TILE_N, aligned, multiply, runs_gluon, tiles
from gptkern.ops.linear.kernels_hopper import linear_hopper
from gptkern.ops.linear.kernels_hopper_backward import linear_dact_hopper, linear_dw_hopper


def serves(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    kernel: str = "linear_hopper",
) -> bool:
    """True if ``kernel`` computes ``a @ b`` on a's device: long sums, and a tile for each multiprocessor.

    Fewer tiles are left to the other kernel, whose smaller ones fill the GPU better. A row's bits are the
    same: both kernels add up the same chain of products.
    """
    if not (runs_gluon(a) and aligned(a) and aligned(b)):
        return False
    wide = bias is None or bias.stride(0) == 1, residual is None or residual.stride(1) == 1
    if a.stride(1) != 1 or not all(wide):
        return False
    row = _launch.config(kernel, a.device)
    long = a.shape[1] >= row["STAGES"] * row["BLOCK_K"]
    return long and tiles(a.shape[0], b.shape[1]) >= _launch.multiprocessors(a.device)


def serves_dact(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if the kernel computes ``(a @ b) * activation'(pre)`` on a's device.

    The rows of ``pre`` must begin at multiples of 16 elements, so that a lane loads eight at once: one by one
    they take more registers than there are.
    """
    return serves(a, b, kernel="linear_dact_hopper") and b.shape[1] % 16 == 0


def serves_weight_grad(dout: torch.Tensor, x: torch.Tensor, other: dict[str, Any], splits: int) -> bool:
    """True if the kernel computes ``dout.T @ x`` in ``splits`` parts on x's device.

    The tiles of the other kernel, by its launch row ``other``, must be as large: then the parts are the same,
    and a weight gradient's bits with them. Each part must be long.
    """
    if not (runs_gluon(x) and aligned(dout) and aligned(x) and dout.stride(1) == x.stride(1) == 1):
        return False
    row = _launch.config("linear_dw_hopper", x.device)
    tile = (other["BLOCK_M"], other["BLOCK_N"], other["BLOCK_K"])
    k_tiles = -(-x.shape[0] // row["BLOCK_K"])
    last = k_tiles - (splits - 1) * -(-k_tiles // splits)
    return tile == (TILE_M, TILE_N, row["BLOCK_K"]) and last >= row["STAGES"]


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
    (m, k), n = a.shape, b.shape[1]
    copies = 2 if gated else 1
    multiply(
        linear_hopper,
        _launch.config("linear_hopper", a.device),
        *(m, n, (a, b)),
        *(bias, residual, out, pre, m, n // copies, k, 0 if residual is None else residual.stride(0)),
        copies=copies,
        ACTIVATION=activation,
        B_ROWS=b.stride(1) == 1,
        GATED=gated,
    )


def product_dact(
    a: torch.Tensor,
    b: torch.Tensor,
    pre: torch.Tensor,
    activation: str,
    *,
    sums: bool,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(``dpre``, its column sums by ROWS rows or None), from ``a @ b`` and ``pre``, which is contiguous.

    With ``gated`` a @ b is the gradient of hidden, and ``pre`` and ``dpre`` are gate and up side by side.
    """
    (m, k), n = a.shape, b.shape[1]
    dpre = torch.empty_like(pre)
    partial = a.new_empty(-(-m // ROWS.value), pre.shape[1], dtype=torch.float32) if sums else None
    multiply(
        linear_dact_hopper,
        _launch.config("linear_dact_hopper", a.device),
        *(m, n, (a, b)),
        *(pre, dpre, partial, m, n, k),
        ACTIVATION=activation,
        B_ROWS=b.stride(1) == 1,
        GATED=gated,
    )
    return dpre, partial


def weight_grad(
    dout: torch.Tensor, x: torch.Tensor, parts: torch.Tensor, strides: tuple[int, ...], splits: int
) -> None:
    """``dout.T @ x`` in ``splits`` parts of the sum over tokens, each of ``strides`` in ``parts``."""
    (tokens, m), n = dout.shape, x.shape[1]
    by_rows = strides[1] == 1
    multiply(
        linear_dw_hopper,
        _launch.config("linear_dw_hopper", x.device),
        *(m, n, (dout, x)),
        *(parts, m, n, tokens, splits, strides[0] if by_rows else strides[1]),
        a_rows=False,
        splits=splits,
        OUT_ROWS=by_rows,
    )
