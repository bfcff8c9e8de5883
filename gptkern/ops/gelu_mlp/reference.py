"""The transformer's two-layer perceptron, in plain PyTorch."""

import torch
import torch.nn.functional as F

from gptkern.ops.linear.reference import linear_act


def gelu_mlp(
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    out = F.linear(linear_act(x, w_fc, b_fc, activation), w_proj, b_proj)
    return out if residual is None else residual + out
