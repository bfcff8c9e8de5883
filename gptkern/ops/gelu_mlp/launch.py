"""The launches of the perceptron, in terms of ``linear``'s.

Forward: two products. Backward: five (with ``pre`` and ``hidden`` saved) or six (recomputed); the
gradients of the activation and of the first bias are in the epilogue of the product that gives dhidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.ops.linear.launch import (
    column_sum,
    matrix,
    matrix_of_grad,
    product,
    product_dact,
    weight_grad,
)

Maybe = torch.Tensor | None


class Layers(NamedTuple):
    """The two linear layers: ``w_fc (hidden, in)``, ``w_proj (out, hidden)`` and their biases or None."""

    w_fc: torch.Tensor
    b_fc: Maybe
    w_proj: torch.Tensor
    b_proj: Maybe


class Saved(NamedTuple):
    """The values that a forward pass saves for its backward pass.

    Attributes:
        x, w_fc, b_fc, w_proj, activation: The arguments.
        pre, hidden: ``(tokens, hidden)``, the hidden layer before and after its activation; None to
            compute it again.
    """

    x: torch.Tensor
    w_fc: torch.Tensor
    b_fc: Maybe
    w_proj: torch.Tensor
    pre: Maybe
    hidden: Maybe
    activation: str


def forward(
    x: torch.Tensor, layers: Layers, residual: Maybe, activation: str, save: bool
) -> tuple[torch.Tensor, Maybe, Maybe]:
    """(out, pre, hidden), the last two None without ``save``."""
    w_fc, b_fc, w_proj, b_proj = layers
    hidden, pre = product(matrix(x), w_fc.t(), b_fc, None, activation, save)
    residual_rows = None if residual is None else matrix(residual)
    out, _ = product(hidden, w_proj.t(), b_proj, residual_rows)
    return out.view(*x.shape[:-1], w_proj.shape[0]), pre, hidden if save else None


def backward(
    dout: torch.Tensor, saved: Saved, needs: tuple[bool, bool, bool, bool, bool]
) -> tuple[Maybe, ...]:
    """(dx, dw_fc, db_fc, dw_proj, db_proj), None for each that ``needs`` does not ask for."""
    x, w_fc, b_fc, w_proj, pre, hidden, activation = saved
    needs_x, needs_w_fc, needs_b_fc, needs_w_proj, needs_b_proj = needs
    dout = matrix_of_grad(dout, x.dtype)
    x_rows = matrix(x)
    if pre is None or hidden is None:
        hidden, pre = product(x_rows, w_fc.t(), b_fc, None, activation, True)
    assert pre is not None
    dw_proj = weight_grad(dout, hidden, w_proj) if needs_w_proj else None
    db_proj = column_sum(dout, x.dtype) if needs_b_proj else None
    if not (needs_x or needs_w_fc or needs_b_fc):
        return None, None, None, dw_proj, db_proj
    dpre, db_fc = product_dact(dout, w_proj, pre, activation, x.dtype if needs_b_fc else None)
    dx = product(dpre, w_fc)[0].view(x.shape) if needs_x else None
    dw_fc = weight_grad(dpre, x_rows, w_fc) if needs_w_fc else None
    return dx, dw_fc, db_fc, dw_proj, db_proj
