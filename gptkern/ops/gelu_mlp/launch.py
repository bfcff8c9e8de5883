"""The launches of a perceptron, in terms of ``linear``'s; ``gated_mlp`` shares all but the first product.

Forward: two products. Backward: five (with ``pre`` and ``hidden`` saved) or six (recomputed); the
gradients of the activation and of the first bias are in the epilogue of the product that gives dhidden.
"""

from __future__ import annotations

from collections.abc import Callable
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


class Form(NamedTuple):
    """One kind of perceptron.

    Attributes:
        op: The public function's name.
        gate: Rows of ``w_fc`` for each value of the hidden layer.
        first: (x, w_fc, b_fc, activation, save) gives (hidden, pre or None).
        first_grad: (dout, w_proj, pre, activation, dtype of sums or None) gives (dpre, its column sums or
            None).
    """

    op: str
    gate: int
    first: Callable[[torch.Tensor, torch.Tensor, Maybe, str, bool], tuple[torch.Tensor, Maybe]]
    first_grad: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, str, torch.dtype | None], tuple[torch.Tensor, Maybe]
    ]


class Layers(NamedTuple):
    """The two linear layers: ``w_fc (gate * hidden, in)``, ``w_proj (out, hidden)``, their biases or None."""

    w_fc: torch.Tensor
    b_fc: Maybe
    w_proj: torch.Tensor
    b_proj: Maybe


class Saved(NamedTuple):
    """The values that a forward pass saves for its backward pass.

    Attributes:
        x, w_fc, b_fc, w_proj, activation: The arguments.
        pre: ``(tokens, gate * hidden)``, the first product before the activation; None to compute it again.
        hidden: ``(tokens, hidden)``, the hidden layer; None to compute it again.
    """

    x: torch.Tensor
    w_fc: torch.Tensor
    b_fc: Maybe
    w_proj: torch.Tensor
    pre: Maybe
    hidden: Maybe
    activation: str


def _first(
    x: torch.Tensor, w_fc: torch.Tensor, b_fc: Maybe, activation: str, save: bool
) -> tuple[torch.Tensor, Maybe]:
    return product(x, w_fc.t(), b_fc, None, activation, save)


PLAIN = Form("gelu_mlp", 1, _first, product_dact)


def forward(
    form: Form, x: torch.Tensor, layers: Layers, residual: Maybe, activation: str, save: bool
) -> tuple[torch.Tensor, Maybe, torch.Tensor]:
    """(out, pre, hidden); pre is None without ``save``."""
    w_fc, b_fc, w_proj, b_proj = layers
    hidden, pre = form.first(matrix(x), w_fc, b_fc, activation, save)
    residual_rows = None if residual is None else matrix(residual)
    out, _ = product(hidden, w_proj.t(), b_proj, residual_rows)
    return out.view(*x.shape[:-1], w_proj.shape[0]), pre, hidden


def backward(
    form: Form, dout: torch.Tensor, saved: Saved, needs: tuple[bool, bool, bool, bool, bool]
) -> tuple[Maybe, ...]:
    """(dx, dw_fc, db_fc, dw_proj, db_proj), None for each that ``needs`` does not ask for."""
    x, w_fc, b_fc, w_proj, pre, hidden, activation = saved
    needs_x, needs_w_fc, needs_b_fc, needs_w_proj, needs_b_proj = needs
    dout = matrix_of_grad(dout, x.dtype)
    x_rows = matrix(x)
    if pre is None or hidden is None:
        hidden, pre = form.first(x_rows, w_fc, b_fc, activation, True)
    assert pre is not None
    dw_proj = weight_grad(dout, hidden, w_proj) if needs_w_proj else None
    db_proj = column_sum(dout, x.dtype) if needs_b_proj else None
    if not (needs_x or needs_w_fc or needs_b_fc):
        return None, None, None, dw_proj, db_proj
    dpre, db_fc = form.first_grad(dout, w_proj, pre, activation, x.dtype if needs_b_fc else None)
    dx = product(dpre, w_fc)[0].view(x.shape) if needs_x else None
    dw_fc = weight_grad(dpre, x_rows, w_fc) if needs_w_fc else None
    return dx, dw_fc, db_fc, dw_proj, db_proj
