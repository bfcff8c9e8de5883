"""From tensors to launches of the norm kernels: layouts, outputs, grids. Layer norm and RMS norm share it."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _checks, _launch
from gptkern.ops.layer_norm import kernels

MAX_WIDTH = 65536
# A row, and what is summed from it, stay in registers up to these widths, on every architecture.
_FORWARD_WIDTH, _BACKWARD_WIDTH = 16384, 8192
_DROPOUT_STEPS = 65536  # dropout draws 16-bit numbers

Maybe = torch.Tensor | None
Layout = tuple[int, int, int]


def layout(op: str, name: str, value: torch.Tensor) -> Layout:
    """(inner, stride_outer, stride_inner): row r lies at r // inner and r % inner of these strides."""
    width = value.shape[-1]
    if value.is_contiguous():
        return max(value.numel() // width, 1), 0, width
    _checks.last_dim_contiguous(op, name, value)
    nested: list[tuple[int, int]] = []
    for size, stride in zip(value.shape[:-1], value.stride()[:-1], strict=True):
        if size == 1:
            continue
        if nested and nested[-1][1] == size * stride:
            nested[-1] = (nested[-1][0] * size, stride)
        else:
            nested.append((size, stride))
    if len(nested) > 2:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)} and strides {value.stride()}; its rows must lie "
            f"in at most two nested strides: call {name}.contiguous() if a copy is acceptable"
        )
    inner, stride_inner = nested[-1] if nested else (1, 0)
    return inner, nested[0][1] if len(nested) == 2 else 0, stride_inner


def _dropout(p: float) -> tuple[int, float]:
    """(threshold, scale): ``p`` rounded to what 16 bits give, and the scale that keeps the mean for it."""
    threshold = min(round(p * _DROPOUT_STEPS), _DROPOUT_STEPS - 1)
    return threshold, _DROPOUT_STEPS / (_DROPOUT_STEPS - threshold)


@_launch.planned
def _plan(kernel: str, width: int, device: torch.device, arch: int) -> tuple[int, dict[str, Any]]:
    """(most programs, arguments) of ``kernel`` for rows of ``width``: never a matter of how many rows."""
    config = dict(_launch.config(kernel, device, width=width))
    programs = config.pop("programs_per_sm", 0) * _launch.multiprocessors(device)
    if "COLUMNS" not in config:
        config.setdefault("BLOCK", max(16, 1 << (width - 1).bit_length()))
    return programs, config


def plan(kernel: str, width: int, device: torch.device) -> tuple[int, dict[str, Any]]:
    return _plan(kernel, width, device, _launch.arch(device))


def forward(
    op: str, x: torch.Tensor, residual: Maybe, weight: torch.Tensor, bias: Maybe, eps: float,
    dropout_p: float, seed: Maybe, centered: bool, dtype: torch.dtype, save_stats: bool,
) -> tuple[torch.Tensor, Any, Any]:  # fmt: skip
    """(normed, new_residual, stats) by the kernel: None without a residual, None without ``save_stats``."""
    width, shape, device = x.shape[-1], x.shape, x.device
    rows = x.numel() // width
    x_layout = residual_layout = layout(op, "x", x)
    out = torch.empty(shape, dtype=dtype, device=device)
    total = stats = None
    if residual is not None:
        residual_layout = layout(op, "residual", residual)
        total = torch.empty(shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=device)
    if save_stats:
        stats = torch.empty((1 + centered, rows), dtype=torch.float32, device=device)
    if width <= _FORWARD_WIDTH:
        kernel = kernels.norm_forward_kernel
        programs, config = plan("norm_forward", width, device)
        grid = min(programs, -(-rows // config["ROWS"]))
    else:
        kernel = kernels.norm_wide_forward_kernel
        grid, config = rows, plan("norm_wide_forward", width, device)[1]
    with _launch.on_device(x):
        _launch.launch(
            kernel, (grid,), x, residual, weight, bias, out, total, stats, seed, *x_layout, *residual_layout,
            rows, eps, *_dropout(dropout_p), WIDTH=width, CENTERED=centered, **config,
        )  # fmt: skip
    return out, total, stats


def backward(
    d_out: torch.Tensor, d_total: Maybe, total: torch.Tensor, weight: torch.Tensor, stats: torch.Tensor,
    dropout_p: float, seed: Maybe, centered: bool, x_dtype: torch.dtype, residual_dtype: torch.dtype,
    weight_grads: bool, bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, Maybe, Maybe, Maybe]:  # fmt: skip
    """(dx, d_residual, d_weight, d_bias); d_residual is None where it equals dx.

    The last two are None without ``weight_grads``, d_bias also without a bias. Gradients that
    arrive with other strides (an expanded one has none) are copied.
    """
    width, device = total.shape[-1], total.device
    rows = total.numel() // width
    wide = width > _BACKWARD_WIDTH
    dx = torch.empty(total.shape, dtype=x_dtype, device=device)
    d_residual = None
    if seed is not None or x_dtype != residual_dtype:
        d_residual = torch.empty(total.shape, dtype=residual_dtype, device=device)
    name = "norm_wide_weight_grad" if wide else "norm_backward"
    programs, config = plan(name, width, device)
    columns = -(-width // config["COLUMNS"]) if wide else 1
    parts = max(1, min(programs // columns, -(-rows // config["ROWS"])))
    d_weight = d_bias = weight_parts = bias_parts = None
    if weight_grads:
        d_weight, weight_parts = torch.empty_like(weight), _parts(parts, width, device)
        if bias_dtype is not None:
            d_bias, bias_parts = torch.empty_like(weight, dtype=bias_dtype), _parts(parts, width, device)
    read = (d_out.contiguous(), None if d_total is None else d_total.contiguous(), total, weight, stats, seed)
    where = (*layout("norm_backward", "total", total), rows)
    dropout, kind = _dropout(dropout_p), {"WIDTH": width, "CENTERED": centered}
    with _launch.on_device(total):
        if not wide:
            _launch.launch(
                kernels.norm_backward_kernel, (min(parts, rows),), *read, dx, d_residual, weight_parts,
                bias_parts, *where, *dropout, **kind, **config,
            )  # fmt: skip
        else:
            _launch.launch(
                kernels.norm_wide_backward_kernel, (rows,), *read, dx, d_residual, *where, *dropout, **kind,
                **plan("norm_wide_backward", width, device)[1],
            )  # fmt: skip
            if weight_grads:
                _launch.launch(
                    kernels.norm_wide_weight_grad_kernel, (columns, parts), read[0], total, stats,
                    weight_parts, bias_parts, *where, **kind, **config,
                )  # fmt: skip
        if weight_grads:
            _, config = plan("norm_weight_grad", width, device)
            _launch.launch(
                kernels.norm_weight_grad_kernel, (-(-width // config["COLUMNS"]),), weight_parts, bias_parts,
                d_weight, d_bias, parts if rows else 0, WIDTH=width, **config,
            )  # fmt: skip
    return dx, d_residual, d_weight, d_bias


def _parts(parts: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.empty((parts, width), dtype=torch.float32, device=device)
