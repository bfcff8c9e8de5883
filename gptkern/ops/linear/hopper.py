"""Launches of the products' kernels for Hopper: the calls that they serve, their tensor maps, their grids."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _launch
from gptkern.ops._gluon import descriptor
from gptkern.ops._hopper import runs_gluon
from gptkern.ops.linear.kernels_hopper import BLOCK_M, BLOCK_N, ROWS, linear_hopper
from gptkern.ops.linear.kernels_hopper_backward import linear_dact_hopper, linear_dw_hopper


def aligned(x: torch.Tensor) -> bool:
    """True if the copy engine and wide loads can read ``x``: contiguous one way, 16-byte steps the other."""
    inner = 1 if x.stride(1) == 1 else 0
    step = x.stride(1 - inner) * x.element_size()
    return x.stride(inner) == 1 and step > 0 and step % 16 == 0 and x.numel() > 0 and x.data_ptr() % 16 == 0


def _row(kernel: str, device: torch.device) -> dict[str, Any]:
    return _launch.config(kernel, device)


def _tiles(m: int, n: int) -> int:
    return -(-m // int(BLOCK_M.value)) * -(-n // int(BLOCK_N.value))


def _programs(tiles: int, device: torch.device) -> tuple[int]:
    return (min(tiles, _launch.multiprocessors(device)),)


def _b_descriptor(b: torch.Tensor, block_k: int, block_n: int) -> Any:
    return descriptor(b, [block_k, block_n]) if b.stride(1) == 1 else descriptor(b.t(), [block_n, block_k])


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
    row = _row(kernel, a.device)
    long = a.shape[1] >= row["STAGES"] * row["BLOCK_K"]
    return long and _tiles(a.shape[0], b.shape[1]) >= _launch.multiprocessors(a.device)


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
    row = _row("linear_dw_hopper", x.device)
    tile = (other["BLOCK_M"], other["BLOCK_N"], other["BLOCK_K"])
    k_tiles = -(-x.shape[0] // row["BLOCK_K"])
    last = k_tiles - (splits - 1) * -(-k_tiles // splits)
    return tile == (BLOCK_M.value, BLOCK_N.value, row["BLOCK_K"]) and last >= row["STAGES"]


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
    row = _row("linear_hopper", a.device)
    (m, k), columns = a.shape, b.shape[1]
    copies = 2 if gated else 1
    _launch.launch(
        linear_hopper,
        _programs(_tiles(m, columns), a.device),
        descriptor(a, [ROWS.value, row["BLOCK_K"]]),
        _b_descriptor(b, row["BLOCK_K"], BLOCK_N.value // copies),
        *(bias, residual, out, pre, m, columns // copies, k),
        0 if residual is None else residual.stride(0),
        ACTIVATION=activation,
        B_ROWS=b.stride(1) == 1,
        GATED=gated,
        **row,
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
    row = _row("linear_dact_hopper", a.device)
    (m, k), n = a.shape, b.shape[1]
    dpre = torch.empty_like(pre)
    partial = a.new_empty(-(-m // ROWS.value), pre.shape[1], dtype=torch.float32) if sums else None
    _launch.launch(
        linear_dact_hopper,
        _programs(_tiles(m, n), a.device),
        descriptor(a, [ROWS.value, row["BLOCK_K"]]),
        _b_descriptor(b, row["BLOCK_K"], BLOCK_N.value),
        *(pre, dpre, partial, m, n, k),
        ACTIVATION=activation,
        B_ROWS=b.stride(1) == 1,
        GATED=gated,
        **row,
    )
    return dpre, partial


def weight_grad(
    dout: torch.Tensor, x: torch.Tensor, parts: torch.Tensor, strides: tuple[int, ...], splits: int
) -> None:
    """``dout.T @ x`` in ``splits`` parts of the sum over tokens, each of ``strides`` in ``parts``."""
    row = _row("linear_dw_hopper", x.device)
    (tokens, m), n = dout.shape, x.shape[1]
    by_rows = strides[1] == 1
    _launch.launch(
        linear_dw_hopper,
        _programs(_tiles(m, n) * splits, x.device),
        descriptor(dout, [row["BLOCK_K"], ROWS.value]),
        descriptor(x, [row["BLOCK_K"], BLOCK_N.value]),
        *(parts, m, n, tokens, splits, strides[0] if by_rows else strides[1]),
        OUT_ROWS=by_rows,
        **row,
    )
