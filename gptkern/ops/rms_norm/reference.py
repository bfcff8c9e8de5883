"""RMS normalisation in plain PyTorch (Zhang and Sennrich 2019, equation 4)."""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dropout_p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual + F.dropout(x, dropout_p)
    return rms_norm(total, weight, eps), total
