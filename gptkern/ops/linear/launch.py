"""The launches of the matrix products that make up ``linear`` and ``gelu_mlp``.

All functions take matrices of any strides that have passed the ops' checks, on one device and, unless
they say otherwise, of one dtype. They allocate their results.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from gptkern.ops import _launch
from gptkern.ops._dispatch import call_key
from gptkern.ops._hopper import aligned
from gptkern.ops._triton import TensorDescriptor
from gptkern.ops.linear import hopper, kernels

# Weight gradients are split for an H100, whatever the GPU, so that every GPU sums in the same order.
# Adding up one tile of one part takes about a ninth of the time of one step of k.
_DW_PROGRAMS = 132
_DW_MOST_SPLITS = 8
_DW_COMBINE = 0.11
_SUM_PARTS = 512

_products: _launch.Plans[_launch.Again] = _launch.Plans()


class Saved(NamedTuple):
    """The values that a forward pass saves for its backward pass.

    Attributes:
        x, weight, activation: The arguments.
        pre: ``(tokens, out)``, the result before the activation; None if there is no activation.
    """

    x: torch.Tensor
    weight: torch.Tensor
    pre: torch.Tensor | None
    activation: str


def matrix(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a matrix of its last dimension, without a copy."""
    return x.view(math.prod(x.shape[:-1]), x.shape[-1])


def matrix_of_grad(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A gradient as a matrix of ``dtype``: autograd chose its layout, so this may copy."""
    return grad.to(dtype).reshape(math.prod(grad.shape[:-1]), grad.shape[-1])


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length() if value > 0 else 0


def _descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    if x.stride(1) != 1:
        x, block = x.t(), block[::-1]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _row(kernel: str, a: torch.Tensor, b: torch.Tensor, **shape: Any) -> dict[str, Any]:
    """The launch row of a kernel for ``a @ b``.

    Sizes are rounded up to powers of two before they select a row, because rows are cached by them.
    """
    m, n = a.shape[0], b.shape[1]
    return _launch.config(
        kernel,
        a.device,
        dtype="fp32" if a.dtype == torch.float32 else "half",
        operands="aligned" if aligned(a) and aligned(b) else "any",
        m=_power_of_two(m),
        tiles=_power_of_two(-(-m // 128) * -(-n // 128)),
        **shape,
    )


def _matrices(
    a: torch.Tensor, b: torch.Tensor, row: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The leading arguments of a kernel for ``a @ b``, and its launch row with the operands' flags."""
    flags = {**row, "A_ROWS": a.stride(1) == 1, "B_ROWS": b.stride(1) == 1}
    if not row["TMA"]:
        return (a, b), flags
    block_m, block_n, block_k = row["BLOCK_M"], row["BLOCK_N"], row["BLOCK_K"]
    return (_descriptor(a, [block_m, block_k]), _descriptor(b, [block_k, block_n])), flags


def operands(
    kernel: str, a: torch.Tensor, b: torch.Tensor, **shape: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The leading arguments of a kernel for ``a @ b``, and its launch row with the operands' flags."""
    return _matrices(a, b, _row(kernel, a, b, **shape))


def tile_count(m: int, n: int, config: dict[str, Any]) -> int:
    block_m, block_n = int(config["BLOCK_M"]), int(config["BLOCK_N"])
    return -(-m // block_m) * -(-n // block_n)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    save_pre: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(``activation(a @ b + bias) + residual`` in the residual's dtype, ``a @ b + bias`` or None)."""
    m, n = a.shape[0], b.shape[1]
    out = a.new_empty(m, n, dtype=a.dtype if residual is None else residual.dtype)
    pre = a.new_empty(m, n) if save_pre else None
    key = call_key((a, b, bias, residual), activation, save_pre, _launch.multiprocessors(a.device))
    with _launch.on_device(a):
        _launch.repeated(
            _products,
            key,
            (a, b, bias, residual, out, pre),
            lambda: _product(a, b, bias, residual, out, pre, activation),
        )
    return out, pre


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str,
) -> None:
    if hopper.serves(a, b, bias, residual):
        hopper.product(a, b, bias, residual, out, pre, activation)
        return
    (m, k), n = a.shape, b.shape[1]
    epilogue = "plain" if activation == "none" else "activation"
    matrices, config = operands("linear", a, b, epilogue=epilogue)
    programs = tile_count(m, n, config)
    if config["PERSISTENT"]:
        programs = min(programs, _launch.multiprocessors(a.device))
    stride_bias = 0 if bias is None else bias.stride(0)
    stride_rm, stride_rn = (0, 0) if residual is None else residual.stride()
    _launch.launch(
        kernels.linear, (programs,), *matrices, bias, residual, out, pre, m, n, k,
        *a.stride(), *b.stride(), stride_bias, stride_rm, stride_rn, ACTIVATION=activation, **config,
    )  # fmt: skip


def summed(
    dpre: torch.Tensor, partial: torch.Tensor | None, sums: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(``dpre``, its column sums in the dtype ``sums`` from those of its parts, or None)."""
    return dpre, None if partial is None or sums is None else column_sum(partial, sums)


def product_dact(
    a: torch.Tensor, b: torch.Tensor, pre: torch.Tensor, activation: str, sums: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``dpre = (a @ b) * activation'(pre)``, and its column sums in the dtype ``sums``."""
    if hopper.serves_dact(a, b):
        with _launch.on_device(a):
            made = hopper.product_dact(a, b, pre, activation, sums=sums is not None)
        return summed(*made, sums)
    (m, k), n = a.shape, b.shape[1]
    dpre = torch.empty_like(pre)
    matrices, config = operands("linear_dact", a, b)
    partial = None if sums is None else a.new_empty(-(-m // config["BLOCK_M"]), n, dtype=torch.float32)
    with _launch.on_device(a):
        _launch.launch(
            kernels.linear_dact, (tile_count(m, n, config),), *matrices, pre, dpre, partial, m, n, k,
            *a.stride(), *b.stride(), ACTIVATION=activation, **config,
        )  # fmt: skip
    return summed(dpre, partial, sums)


def _dw_splits(tiles: int, k_tiles: int) -> int:
    """The number of parts of the sum over tokens with the fewest steps of k, combining included."""

    def steps(splits: int) -> float:
        waves = -(-tiles * splits // _DW_PROGRAMS)
        return waves * -(-k_tiles // splits) + (_DW_COMBINE * tiles * splits if splits > 1 else 0.0)

    return min(range(1, max(1, min(_DW_MOST_SPLITS, k_tiles)) + 1), key=steps)


def weight_grad(dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``dout.T @ x`` in ``weight``'s layout. The shapes alone fix the parts of the sum over tokens."""
    (tokens, m), n = dout.shape, x.shape[1]
    dw = torch.empty_like(weight)
    dout_t = dout.t()
    config = _row("linear_dw", dout_t, x)
    tiles = tile_count(m, n, config)
    splits = _dw_splits(tiles, -(-tokens // config["BLOCK_K"]))
    parts = dw if splits == 1 else dw.new_empty(splits, m * n, dtype=torch.float32)
    with _launch.on_device(x):
        if hopper.serves_weight_grad(dout, x, config, splits):
            hopper.weight_grad(dout, x, parts, dw.stride(), splits)
        else:
            matrices, flags = _matrices(dout_t, x, config)
            _launch.launch(
                kernels.linear_dw, (tiles, splits), *matrices, parts, m, n, tokens,
                *dout_t.stride(), *x.stride(), *dw.stride(), **flags,
            )  # fmt: skip
        if splits > 1:
            _sum_launch(parts, splits, dw)
    return dw


def _sum_launch(
    x: torch.Tensor,
    rows_per_program: int,
    sums: torch.Tensor | None,
    pre: torch.Tensor | None = None,
    dpre: torch.Tensor | None = None,
    activation: str = "none",
) -> None:
    m, n = x.shape
    config = _launch.config("column_sum", x.device, rows=min(rows_per_program, 1024))
    grid = (-(-n // config["BLOCK_N"]), max(1, -(-m // rows_per_program)))
    _launch.launch(
        kernels.column_sum, grid, x, pre, dpre, sums, m, n, *x.stride(), rows_per_program,
        ACTIVATION=activation, **config,
    )  # fmt: skip


def _rows_per_part(m: int) -> int:
    """Rows of one part: a multiple of 64, and at most _SUM_PARTS parts, which are few to add up."""
    return 64 * max(1, -(-m // (64 * _SUM_PARTS)))


def column_sum(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of ``x``'s rows: first within each part, then over the parts."""
    m, n = x.shape
    sums = x.new_empty(n, dtype=dtype)
    part = _rows_per_part(m)
    with _launch.on_device(x):
        if m > part:
            parts = x.new_empty(-(-m // part), n, dtype=torch.float32)
            _sum_launch(x, part, parts)
            x = parts
        _sum_launch(x, max(1, x.shape[0]), sums)
    return sums


def dact(
    dout: torch.Tensor, pre: torch.Tensor, activation: str, sums: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``dpre = dout * activation'(pre)`` in one pass, and its column sums in the dtype ``sums``."""
    m, n = pre.shape
    dpre = torch.empty_like(pre)
    part = _rows_per_part(m)
    parts = None if sums is None else pre.new_empty(max(1, -(-m // part)), n, dtype=torch.float32)
    with _launch.on_device(pre):
        _sum_launch(dout, part, parts, pre, dpre, activation)
    return dpre, None if parts is None or sums is None else column_sum(parts, sums)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(``activation(x @ weight.T + bias) + residual``, the value before the activation or None)."""
    residual_rows = None if residual is None else matrix(residual)
    out, pre = product(matrix(x), weight.t(), bias, residual_rows, activation, save_pre)
    return out.view(*x.shape[:-1], weight.shape[0]), pre


def backward(
    dout: torch.Tensor, saved: Saved, needs: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias), None for each that ``needs`` does not ask for."""
    x, weight, pre, activation = saved
    needs_x, needs_weight, needs_bias = needs
    dpre = matrix_of_grad(dout, x.dtype)
    dbias = None
    sums = x.dtype if needs_bias else None
    if pre is not None:
        dpre, dbias = dact(dpre, pre, activation, sums)
    elif needs_bias:
        dbias = column_sum(dpre, x.dtype)
    dx = product(dpre, weight)[0].view(x.shape) if needs_x else None
    dweight = weight_grad(dpre, matrix(x), weight) if needs_weight else None
    return dx, dweight, dbias
