"""Layer normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch

from gptkern.ops.layer_norm import reference


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Layer normalisation over the last dimension."""
    return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``new_residual = residual + dropout(x)`` and its layer normalisation: (normed, new_residual)."""
    return reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p)
