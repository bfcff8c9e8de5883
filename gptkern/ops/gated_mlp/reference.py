"""The gated two-layer perceptron (Shazeer 2020, "GLU Variants Improve Transformer"), in plain PyTorch."""

import torch
import torch.nn.functional as F

from gptkern.ops.linear.reference import ACTIVATIONS, activation_backward, linear_backward


def gated_mlp(
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    gate, up = F.linear(x, w_fc, b_fc).chunk(2, dim=-1)
    out = F.linear(ACTIVATIONS[activation](gate) * up, w_proj, b_proj)
    return out if residual is None else residual + out


def gated_mlp_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    """(dx, dw_fc, db_fc, dw_proj, db_proj) of matrices ``x`` and ``dout``, for use when autograd is off."""
    gate, up = F.linear(x, w_fc, b_fc).chunk(2, dim=-1)
    activated = ACTIVATIONS[activation](gate)
    dhidden, dw_proj, db_proj = linear_backward(dout, activated * up, w_proj, dout, "none")
    dgate = activation_backward(dhidden * up, gate, activation)
    dpre = torch.cat((dgate, dhidden * activated), dim=-1)
    dx, dw_fc, db_fc = linear_backward(dpre, x, w_fc, dpre, "none")
    return dx, dw_fc, db_fc, dw_proj, db_proj
