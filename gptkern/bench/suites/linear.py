"""Linear layers with their epilogue fused, at GPT-2's shapes: bound by the matrix units."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gptkern import ops
from gptkern.bench.problem import Inputs, Problem
from gptkern.bench.suites import _providers as shared

# (rows, in, out): the four products of GPT-2 124M, then of 1.5B
GPU = [(16384, 768, 3072), (16384, 3072, 768), (16384, 1600, 6400), (16384, 6400, 1600)]
CPU = [(128, 768, 3072), (128, 3072, 768)]


def _act(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    return residual + F.linear(x, weight, bias)


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Both epilogues on every shape, beside the bare product of the vendor's library."""
    for dtype in shared.dtypes(device, quick):
        for shape in shared.of_widths(device, GPU, CPU, quick):
            yield _problem("act", shape, dtype, quick)
            yield _problem("residual", shape, dtype, quick)


def _problem(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, quick: bool) -> Problem:
    rows, k, n = shape
    with_residual = kind == "residual"

    def inputs(device: torch.device) -> Inputs:
        made = [
            shared.randn(rows, k, dtype=dtype, device=device),
            shared.randn(n, k, dtype=dtype, device=device, scale=k**-0.5),
            shared.randn(n, dtype=dtype, device=device),
        ]
        if with_residual:
            made.append(shared.randn(rows, n, dtype=dtype, device=device))
        return tuple(made)

    plain = _residual if with_residual else _act
    op = ops.linear_residual if with_residual else ops.linear_act
    elements = rows * k + n * k + (2 if with_residual else 1) * rows * n
    return Problem(
        "linear",
        f"{kind} {rows}x{k}x{n}",
        dtype,
        inputs,
        {"gptkern": op, **shared.eager_and_compiled(plain, quick)},
        plain,
        bytes_moved=elements * dtype.itemsize,
        flops=2.0 * rows * k * n,
    )
