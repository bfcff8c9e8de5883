"""Layer norm, alone and with the residual addition before it: bound by memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gptkern import ops
from gptkern.bench.problem import Inputs, Problem, Provider, Unavailable
from gptkern.bench.suites import _providers as shared

GPU = [(16384, 768), (16384, 1600), (65536, 768), (1, 768), (64, 1600), (16384, 1024)]
CPU = [(1024, 768), (32, 1600), (4096, 1024)]


def _add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return F.layer_norm(total, (total.shape[-1],), weight, bias), total


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias)


def _liger(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        raise Unavailable("Liger-Kernel needs a GPU")
    from liger_kernel.transformers.functional import liger_layer_norm

    normed: torch.Tensor = liger_layer_norm(x, weight, bias, 1e-5)
    return normed


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Forward of both ops, backward of the plain norm."""
    for dtype in shared.dtypes(device, quick):
        for rows, width in shared.of_widths(device, GPU, CPU, quick):
            yield from _problems(rows, width, dtype, quick)


def _problems(rows: int, width: int, dtype: torch.dtype, quick: bool) -> Iterator[Problem]:
    size = dtype.itemsize

    def plain(device: torch.device, grad: bool = False) -> Inputs:
        x = shared.randn(rows, width, dtype=dtype, device=device, grad=grad)
        return x, *_weights(width, dtype, device, grad)

    def added(device: torch.device) -> Inputs:
        x, residual = (shared.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
        return x, residual, *_weights(width, dtype, device, False)

    peers: dict[str, Provider] = {"gptkern": ops.layer_norm, **shared.eager_and_compiled(_layer_norm, quick)}
    if shared.installed("liger_kernel"):
        peers["liger"] = _liger
    yield Problem("layer_norm", f"{rows}x{width}", dtype, plain, peers, _layer_norm, 2 * rows * width * size)
    yield Problem(
        "layer_norm",
        f"add {rows}x{width}",
        dtype,
        added,
        {"gptkern": ops.add_layer_norm, **shared.eager_and_compiled(_add_layer_norm, quick)},
        _add_layer_norm,
        4 * rows * width * size,
    )
    if rows > 64:
        yield Problem(
            "layer_norm",
            f"{rows}x{width}",
            dtype,
            lambda device: plain(device, grad=True),
            dict(peers),
            _layer_norm,
            3 * rows * width * size,
            backward=True,
        )


def _weights(width: int, dtype: torch.dtype, device: torch.device, grad: bool) -> Inputs:
    return tuple(shared.randn(width, dtype=dtype, device=device, grad=grad) for _ in range(2))
