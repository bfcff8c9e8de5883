"""The launches of the perceptron, in terms of ``linear``'s.

Forward: two products. Backward: five (with ``pre`` and ``hidden`` saved) or six (recomputed), the
activation's gradient and the first bias's gradient in the epilogue of the one that gives dhidden.
"""

from __future__ import annotations

import torch

from gptkern.ops.linear.launcher import (
    column_sum,
    matrix,
    matrix_of_grad,
    product,
    product_dact,
    weight_grad,
)


def forward(
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(out, pre, hidden), the last two None unless they are to be saved for the backward pass."""
    hidden, pre = product(matrix(x), w_fc.t(), b_fc, None, activation, save)
    other = None if residual is None else matrix(residual)
    out, _ = product(hidden, w_proj.t(), b_proj, other)
    return out.view(*x.shape[:-1], w_proj.shape[0]), pre, hidden if save else None


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    pre: torch.Tensor | None,
    hidden: torch.Tensor | None,
    activation: str,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dw_fc, db_fc, dw_proj, db_proj), None where it is not needed."""
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
