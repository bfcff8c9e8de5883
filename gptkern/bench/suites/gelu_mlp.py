"""The GELU-MLP at GPT-2's widths: bound by the matrix units."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gptkern import ops
from gptkern.bench.problem import Inputs, Problem
from gptkern.bench.suites import _providers as shared

GPU = [(16384, 768), (16384, 1024), (16384, 1600), (4096, 768)]
CPU = [(128, 768), (16, 1024), (512, 768)]


def _mlp(
    x: torch.Tensor, w_fc: torch.Tensor, b_fc: torch.Tensor, w_proj: torch.Tensor, b_proj: torch.Tensor
) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Forward and backward of every shape."""
    for dtype in shared.dtypes(device, quick):
        for rows, width in shared.of_widths(device, GPU, CPU, quick):
            for backward in (False, True):
                yield _problem(rows, width, dtype, quick, backward)


def _problem(rows: int, width: int, dtype: torch.dtype, quick: bool, backward: bool) -> Problem:
    def inputs(device: torch.device) -> Inputs:
        def make(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return shared.randn(*shape, dtype=dtype, device=device, grad=backward, scale=scale)

        return (
            make(rows, width),
            make(4 * width, width, scale=width**-0.5),
            make(4 * width),
            make(width, 4 * width, scale=(4 * width) ** -0.5),
            make(width),
        )

    elements = 2 * rows * width + 8 * width * width
    return Problem(
        "gelu_mlp",
        f"{rows}x{width}x{4 * width}",
        dtype,
        inputs,
        {"gptkern": ops.gelu_mlp, **shared.eager_and_compiled(_mlp, quick)},
        _mlp,
        bytes_moved=(2 if backward else 1) * elements * dtype.itemsize,
        flops=(2 if backward else 1) * 16.0 * rows * width * width,
        backward=backward,
    )
