"""Linear layers with a fused epilogue: bias and activation, bias and residual."""

from __future__ import annotations

import torch

from gptkern.ops.linear import reference


def linear_act(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str = "gelu_tanh"
) -> torch.Tensor:
    """``activation(x @ weight.T + bias)``."""
    return reference.linear_act(x, weight, bias, activation)


def linear_residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """``residual + x @ weight.T + bias``."""
    return reference.linear_residual(x, weight, bias, residual)
