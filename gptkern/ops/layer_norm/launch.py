"""Launches of the norm kernels: layouts, outputs, grids. Layer norm and RMS norm share them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gptkern.ops import _checks, _launch
from gptkern.ops.layer_norm import kernels

MAX_WIDTH = 65536
# A row and its sums stay in registers up to these widths, on every architecture.
_FORWARD_WIDTH, _BACKWARD_WIDTH = 16384, 8192
_DROPOUT_STEPS = 65536  # dropout draws 16-bit numbers

Maybe = torch.Tensor | None
Layout = tuple[int, int, int]


class Settings(NamedTuple):
    """The arguments of a call that are no tensors.

    Attributes:
        op: The public function's name, for errors.
        centered: True for layer norm; RMS norm subtracts no mean.
        eps: Added to the variance, or to the mean square.
        dropout_p: Probability that an element of ``x`` is dropped before the addition.
        dtype: Of the normalised rows.
        unit_offset: The factors are ``1 + weight``.
    """

    op: str
    centered: bool
    eps: float
    dropout_p: float
    dtype: torch.dtype
    unit_offset: bool = False


class Saved(NamedTuple):
    """The values that a forward pass saves for its backward pass.

    Attributes:
        total: The rows that were normalised: the sum, or ``x`` if there was no residual.
        weight: ``(width,)`` or None.
        stats: fp32 ``(2, rows)``: 1 / standard deviation, mean (RMS norm: ``(1, rows)``).
        seed: ``(1,)`` int64, None without dropout.
        dropout_p, centered, unit_offset: As in ``Settings``.
        x_dtype, residual_dtype, bias_dtype: Of the gradients; ``bias_dtype`` is None without a bias.
    """

    total: torch.Tensor
    weight: Maybe
    stats: torch.Tensor
    seed: Maybe
    dropout_p: float
    centered: bool
    unit_offset: bool
    x_dtype: torch.dtype
    residual_dtype: torch.dtype
    bias_dtype: torch.dtype | None

    @property
    def separate_residual_grad(self) -> bool:
        """True if the residual's gradient differs from that of ``x``: by dropout or in dtype."""
        return self.seed is not None or self.x_dtype != self.residual_dtype


def layout(op: str, name: str, value: torch.Tensor) -> Layout:
    """(inner, stride_outer, stride_inner) of a tensor's rows.

    Row r starts at ``r // inner * stride_outer + r % inner * stride_inner``. The leading dimensions must
    collapse to at most two strided loops; a stride of 0 is allowed.
    """
    width = value.shape[-1]
    if value.is_contiguous():
        return max(value.numel() // width, 1), 0, width
    return _checks.strided_loops(op, name, value, 1, "leading dimensions")


def _dropout(p: float) -> tuple[int, float]:
    """(threshold, scale): ``p`` in units of 2**-16, and the factor that preserves the mean."""
    threshold = min(round(p * _DROPOUT_STEPS), _DROPOUT_STEPS - 1)
    return threshold, _DROPOUT_STEPS / (_DROPOUT_STEPS - threshold)


@_launch.planned
def _plan(kernel: str, width: int, device: torch.device, arch: int) -> tuple[int, dict[str, Any]]:
    """(number of programs, arguments) of ``kernel`` by the rows' width alone, never by their number."""
    config = dict(_launch.config(kernel, device, width=width))
    programs = config.pop("programs_per_sm", 0) * _launch.multiprocessors(device)
    if "COLUMNS" not in config:
        config.setdefault("BLOCK", max(16, 1 << (width - 1).bit_length()))
    return programs, config


def plan(kernel: str, width: int, device: torch.device) -> tuple[int, dict[str, Any]]:
    """(largest number of programs, arguments) of a kernel for rows of ``width``."""
    return _plan(kernel, width, device, _launch.arch(device))


class Forward(NamedTuple):
    """A forward pass as it is launched, whatever numbers its tensors hold.

    Attributes:
        settings: The arguments that are no tensors.
        kernel, grid: The kernel and its programs.
        numbers, options: The arguments after the tensors, by position and by name.
        shape, total_dtype, stats_shape: Of the results; the dtype is None without a residual.
    """

    settings: Settings
    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[float, ...]
    options: dict[str, Any]
    shape: torch.Size
    total_dtype: torch.dtype | None
    stats_shape: tuple[int, int]


def forward_plan(x: torch.Tensor, residual: Maybe, settings: Settings) -> Forward:
    """The launch of a forward pass over tensors of these shapes, strides and dtypes."""
    op, centered, eps, dropout_p, _, unit_offset = settings
    width, device = x.shape[-1], x.device
    rows = x.numel() // width
    x_layout = residual_layout = layout(op, "x", x)
    total_dtype = None
    if residual is not None:
        residual_layout = layout(op, "residual", residual)
        total_dtype = torch.promote_types(x.dtype, residual.dtype)
    if width <= _FORWARD_WIDTH:
        kernel = kernels.norm_forward_kernel
        programs, config = plan("norm_forward", width, device)
        grid = min(programs, -(-rows // config["ROWS"]))
    else:
        kernel = kernels.norm_wide_forward_kernel
        grid, config = rows, plan("norm_wide_forward", width, device)[1]
    numbers = (*x_layout, *residual_layout, rows, float(eps), *_dropout(dropout_p))
    options = {"WIDTH": width, "CENTERED": centered, "UNIT_OFFSET": unit_offset, **config}
    stats_shape = (1 + centered, rows)
    return Forward(settings, kernel, (grid,), numbers, options, x.shape, total_dtype, stats_shape)


def forward(
    plan: Forward,
    x: torch.Tensor,
    residual: Maybe,
    weight: Maybe,
    bias: Maybe,
    seed: Maybe,
    save_stats: bool,
) -> tuple[torch.Tensor, Any, Any]:
    """(normed, new_residual, stats): None without a residual, None without ``save_stats``."""
    settings, kernel, grid, numbers, options, shape, total_dtype, stats_shape = plan
    device = x.device
    out = torch.empty(shape, dtype=settings.dtype, device=device)
    total = stats = None
    if total_dtype is not None:
        total = torch.empty(shape, dtype=total_dtype, device=device)
    if save_stats:
        stats = torch.empty(stats_shape, dtype=torch.float32, device=device)
    with _launch.on_device(x):
        _launch.launch(
            kernel, grid, x, residual, weight, bias, out, total, stats, seed, *numbers, **options
        )  # fmt: skip
    return out, total, stats


def backward(
    d_out: torch.Tensor, d_total: Maybe, saved: Saved, weight_grads: bool
) -> tuple[torch.Tensor, Maybe, Maybe, Maybe]:
    """(dx, d_residual, d_weight, d_bias); d_residual is None if it equals dx.

    The last two are None without ``weight_grads`` or a weight, d_bias also without a bias. Gradients that are
    not contiguous (autograd may expand one) are copied.
    """
    total, weight, stats, seed, dropout_p, centered, unit_offset, x_dtype, residual_dtype, bias_dtype = saved
    width, device = total.shape[-1], total.device
    rows = total.numel() // width
    wide = width > _BACKWARD_WIDTH
    dx = torch.empty(total.shape, dtype=x_dtype, device=device)
    d_residual = None
    if saved.separate_residual_grad:
        d_residual = torch.empty(total.shape, dtype=residual_dtype, device=device)
    name = "norm_wide_weight_grad" if wide else "norm_backward"
    programs, config = plan(name, width, device)
    columns = -(-width // config["COLUMNS"]) if wide else 1
    parts = max(1, min(programs // columns, -(-rows // config["ROWS"])))
    d_weight = d_bias = weight_parts = bias_parts = None
    weight_grads = weight_grads and weight is not None
    if weight_grads:
        assert weight is not None
        d_weight, weight_parts = torch.empty_like(weight), _parts(parts, width, device)
        if bias_dtype is not None:
            d_bias, bias_parts = torch.empty_like(weight, dtype=bias_dtype), _parts(parts, width, device)
    d_out = d_out.contiguous()
    inputs = (d_out, None if d_total is None else d_total.contiguous(), total, weight, stats, seed)
    total_rows = (*layout("norm_backward", "total", total), rows)
    dropout, kind = _dropout(dropout_p), {"WIDTH": width, "CENTERED": centered}
    with _launch.on_device(total):
        if not wide:
            _launch.launch(
                kernels.norm_backward_kernel, (min(parts, rows),), *inputs, dx, d_residual, weight_parts,
                bias_parts, *total_rows, *dropout, **kind, UNIT_OFFSET=unit_offset, **config,
            )  # fmt: skip
        else:
            _launch.launch(
                kernels.norm_wide_backward_kernel, (rows,), *inputs, dx, d_residual, *total_rows, *dropout,
                **kind, UNIT_OFFSET=unit_offset, **plan("norm_wide_backward", width, device)[1],
            )  # fmt: skip
            if weight_grads:
                _launch.launch(
                    kernels.norm_wide_weight_grad_kernel, (columns, parts), d_out, total, stats,
                    weight_parts, bias_parts, *total_rows, **kind, **config,
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
