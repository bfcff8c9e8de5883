"""The gated MLP at the widths of Llama's kin: bound by the matrix units."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gptkern import ops
from gptkern.bench.problem import Inputs, Problem
from gptkern.bench.suites import _providers as shared

# Tokens, width, inner width: SmolLM2 135M, Qwen3 0.6B, Llama 3.2 1B.
GPU = [(16384, 576, 1536), (16384, 1024, 3072), (8192, 2048, 8192)]
CPU = [(128, 576, 1536), (512, 576, 1536)]


def _mlp(x: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, w_fc).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w_proj)


def _fused(x: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor) -> torch.Tensor:
    return ops.gated_mlp(x, w_fc, None, w_proj, None)


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Forward and backward of every shape."""
    for dtype in shared.dtypes(device, quick):
        for rows, width, inner in shared.of_widths(device, GPU, CPU, quick):
            for backward in (False, True):
                yield _problem(rows, width, inner, dtype, quick, backward)


def _problem(rows: int, width: int, inner: int, dtype: torch.dtype, quick: bool, backward: bool) -> Problem:
    def inputs(device: torch.device) -> Inputs:
        def make(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return shared.randn(*shape, dtype=dtype, device=device, grad=backward, scale=scale)

        return (
            make(rows, width),
            make(2 * inner, width, scale=width**-0.5),
            make(width, inner, scale=inner**-0.5),
        )

    elements = 2 * rows * width + 3 * inner * width
    return Problem(
        "gated_mlp",
        f"{rows}x{width}x{inner}",
        dtype,
        inputs,
        {"gptkern": _fused, **shared.eager_and_compiled(_mlp, quick)},
        _mlp,
        bytes_moved=(2 if backward else 1) * elements * dtype.itemsize,
        flops=(2 if backward else 1) * 6.0 * rows * width * inner,
        backward=backward,
    )
