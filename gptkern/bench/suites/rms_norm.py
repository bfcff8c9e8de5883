"""RMS norm, alone and with the residual addition before it: bound by memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gptkern import ops
from gptkern.bench.problem import Inputs, Problem
from gptkern.bench.suites import _providers as shared

GPU = [(16384, 2048), (16384, 4096), (1, 4096), (64, 4096)]
CPU = [(512, 2048), (1, 4096)]


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _rms_norm(total, weight), total


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Forward of both ops, backward of the plain norm."""
    for dtype in shared.dtypes(device, quick):
        for rows, width in shared.of_widths(device, GPU, CPU, quick):
            yield _plain(rows, width, dtype, quick, backward=False)
            yield _added(rows, width, dtype, quick)
            if rows > 64:
                yield _plain(rows, width, dtype, quick, backward=True)


def _plain(rows: int, width: int, dtype: torch.dtype, quick: bool, backward: bool) -> Problem:
    def inputs(device: torch.device) -> Inputs:
        x = shared.randn(rows, width, dtype=dtype, device=device, grad=backward)
        return x, shared.randn(width, dtype=dtype, device=device, grad=backward)

    return Problem(
        "rms_norm",
        f"{rows}x{width}",
        dtype,
        inputs,
        {
            "gptkern": lambda x, weight: ops.rms_norm(x, weight, 1e-6),
            **shared.eager_and_compiled(_rms_norm, quick),
        },
        _rms_norm,
        bytes_moved=(3 if backward else 2) * rows * width * dtype.itemsize,
        backward=backward,
    )


def _added(rows: int, width: int, dtype: torch.dtype, quick: bool) -> Problem:
    def inputs(device: torch.device) -> Inputs:
        x, residual = (shared.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
        return x, residual, shared.randn(width, dtype=dtype, device=device)

    return Problem(
        "rms_norm",
        f"add {rows}x{width}",
        dtype,
        inputs,
        {
            "gptkern": lambda x, residual, weight: ops.add_rms_norm(x, residual, weight, 1e-6),
            **shared.eager_and_compiled(_add_rms_norm, quick),
        },
        _add_rms_norm,
        bytes_moved=4 * rows * width * dtype.itemsize,
    )
