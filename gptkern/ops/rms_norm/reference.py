"""RMS normalisation in plain PyTorch (Zhang and Sennrich 2019, equation 4)."""

import torch
import torch.nn.functional as F


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, unit_offset: bool = False
) -> torch.Tensor:
    if weight is None or (weight.dtype == x.dtype and not unit_offset):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    # A factor wider than x, or 1 + weight, would lose its digits in x's dtype.
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    factor = weight.to(wide) + 1.0 if unit_offset else weight.to(wide)
    return F.rms_norm(x.to(wide), (x.shape[-1],), factor, eps).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual + F.dropout(x, dropout_p)
    return rms_norm(total, weight, eps, unit_offset), total
