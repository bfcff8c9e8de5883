"""The head and its loss with both gradients, GPT-2's vocabulary: three matrix products at the least."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gptkern
from gptkern import ops
from gptkern.bench.problem import Inputs, Problem, Provider
from gptkern.bench.suites import _providers as shared

VOCAB = 50257
# (tokens, width)
GPU = [(16384, 768), (65536, 768), (16384, 1600)]
CPU = [(128, 768)]


def _unfused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with gptkern.backend("reference"):
        return ops.linear_cross_entropy(hidden, weight, targets)


def _liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: torch.Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets)
    return loss


def _with_gradients(loss_of: Provider) -> Provider:
    """Loss and gradients together: who computes which of them when differs between providers."""

    def call(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = loss_of(hidden, weight, targets)
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    return call


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Loss and both gradients on every shape."""
    for dtype in shared.dtypes(device, quick):
        for tokens, width in shared.of_widths(device, GPU, CPU, quick):
            yield _problem(tokens, width, dtype, quick)


def _problem(tokens: int, width: int, dtype: torch.dtype, quick: bool) -> Problem:
    def inputs(device: torch.device) -> Inputs:
        return (
            shared.randn(tokens, width, dtype=dtype, device=device, grad=True),
            shared.randn(VOCAB, width, dtype=dtype, device=device, scale=width**-0.5, grad=True),
            torch.randint(VOCAB, (tokens,), device=device),
        )

    peers: dict[str, Provider] = {
        "gptkern": ops.linear_cross_entropy,
        **shared.eager_and_compiled(_unfused, quick),
    }
    if shared.installed("liger_kernel"):
        peers["liger"] = _liger
    return Problem(
        "linear_cross_entropy",
        f"{tokens}x{width}",
        dtype,
        inputs,
        {name: _with_gradients(peer) for name, peer in peers.items()},
        _with_gradients(_exact),
        bytes_moved=2.0 * (tokens + VOCAB) * width * dtype.itemsize,
        flops=3 * 2.0 * tokens * VOCAB * width,
    )
