"""The transformer's two-layer perceptron, in plain PyTorch."""

import torch
import torch.nn.functional as F

from gptkern.ops.linear.reference import ACTIVATIONS, linear_act, linear_backward


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


def gelu_mlp_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    """(dx, dw_fc, db_fc, dw_proj, db_proj) of matrices ``x`` and ``dout``, for use when autograd is off."""
    pre = F.linear(x, w_fc, b_fc)
    hidden = ACTIVATIONS[activation](pre)
    dhidden, dw_proj, db_proj = linear_backward(dout, hidden, w_proj, dout, "none")
    dx, dw_fc, db_fc = linear_backward(dhidden, x, w_fc, pre, activation)
    return dx, dw_fc, db_fc, dw_proj, db_proj
