"""The launches of the gated perceptron's first product; the rest is ``gelu_mlp``'s."""

from __future__ import annotations

import torch

from gptkern.ops import _launch
from gptkern.ops.gated_mlp import kernels
from gptkern.ops.gelu_mlp.launch import Form
from gptkern.ops.linear import hopper
from gptkern.ops.linear.launch import operands, summed, tile_count

Maybe = torch.Tensor | None


def product_gated(
    x: torch.Tensor, w_fc: torch.Tensor, b_fc: Maybe, activation: str, save: bool
) -> tuple[torch.Tensor, Maybe]:
    """(``activation(gate) * up``, gate and up side by side or None)."""
    (m, k), n = x.shape, w_fc.shape[0] // 2
    hidden = x.new_empty(m, n)
    pre = x.new_empty(m, 2 * n) if save else None
    weight = w_fc.t()
    if hopper.serves(x, weight, b_fc):
        with _launch.on_device(x):
            hopper.product(x, weight, b_fc, None, hidden, pre, activation, gated=True)
        return hidden, pre
    matrices, config = operands("gated_linear", x, weight)
    with _launch.on_device(x):
        _launch.launch(
            kernels.gated_linear, (tile_count(m, n, config),), *matrices, b_fc, hidden, pre, m, n, k,
            *x.stride(), *weight.stride(), 0 if b_fc is None else b_fc.stride(0),
            ACTIVATION=activation, **config,
        )  # fmt: skip
    return hidden, pre


def product_gated_dact(
    dout: torch.Tensor, w_proj: torch.Tensor, pre: torch.Tensor, activation: str, sums: torch.dtype | None
) -> tuple[torch.Tensor, Maybe]:
    """The gradients of gate and up side by side, and their column sums in the dtype ``sums``."""
    if hopper.serves_dact(dout, w_proj):
        with _launch.on_device(dout):
            made = hopper.product_dact(dout, w_proj, pre, activation, sums=sums is not None, gated=True)
        return summed(*made, sums)
    (m, k), n = dout.shape, w_proj.shape[1]
    dpre = torch.empty_like(pre)
    matrices, config = operands("gated_linear_dact", dout, w_proj)
    rows = -(-m // config["BLOCK_M"])
    partial = None if sums is None else dout.new_empty(rows, 2 * n, dtype=torch.float32)
    with _launch.on_device(dout):
        _launch.launch(
            kernels.gated_linear_dact, (tile_count(m, n, config),), *matrices, pre, dpre, partial, m, n, k,
            *dout.stride(), *w_proj.stride(), ACTIVATION=activation, **config,
        )  # fmt: skip
    return summed(dpre, partial, sums)


GATED = Form("gated_mlp", 2, product_gated, product_gated_dact)
