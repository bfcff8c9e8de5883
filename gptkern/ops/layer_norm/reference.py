"""Layer normalisation in plain PyTorch (Ba, Kiros and Hinton 2016, equations 3 and 4)."""

import torch
import torch.nn.functional as F


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    weight, bias = (None if value is None else value.to(x.dtype) for value in (weight, bias))
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual + F.dropout(x, dropout_p)
    return layer_norm(total, weight, bias, eps), total
