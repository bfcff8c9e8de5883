"""The GELU-MLP: two linear layers, the first with its activation, the second with its residual, fused."""

from __future__ import annotations

import torch

from gptkern.ops.gelu_mlp import reference


def gelu_mlp(
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    *,
    activation: str = "gelu_tanh",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(x @ w_fc.T + b_fc) @ w_proj.T + b_proj (+ residual)``."""
    return reference.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, activation, residual)
