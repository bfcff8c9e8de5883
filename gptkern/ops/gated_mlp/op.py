"""The gated MLP: two linear layers, the first gated in its epilogue, the second with its residual, fused."""

from __future__ import annotations

import torch

from gptkern.ops.gated_mlp import reference, register  # noqa: F401  (torch.ops.gptkern.gated_mlp)
from gptkern.ops.gated_mlp.launch import GATED
from gptkern.ops.gelu_mlp.launch import Layers
from gptkern.ops.gelu_mlp.op import mlp


def gated_mlp(
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    *,
    activation: str = "silu",
    residual: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """``residual + (activation(gate) * up) @ w_proj.T + b_proj`` (Shazeer 2020, SwiGLU and its kin).

    ``gate, up = (x @ w_fc.T + b_fc).chunk(2, -1)``. Two products: biases, activation and the gate in the
    epilogue of the first, bias and residual in that of the second. In the backward pass the gate's gradients
    are in the epilogue of a product too. All accumulate in fp32; a row's result does not depend on the other
    rows.

    Args:
        x: ``(..., in)``, fp32, fp16 or bf16 (float64 on a CPU). Any strides whose leading
            dimensions merge into one.
        w_fc: ``(2 * hidden, in)``, any strides: the rows of the gate, then those of up. Of ``x``'s dtype, as
            all but the residual.
        b_fc: ``(2 * hidden,)`` or None.
        w_proj: ``(out, hidden)``, any strides.
        b_proj: ``(out,)`` or None.
        activation: Of the gate: ``"silu"``, ``"gelu_tanh"``, ``"gelu"`` (by erf), ``"relu"`` or ``"none"``.
        residual: ``(..., out)`` or None, any strides whose leading dimensions merge into one; of
            ``x``'s dtype, or fp32 beside fp16 and bf16.
        recompute: Save only the arguments for the backward pass, and compute the hidden layer again
            there: one product more, and ``3 * tokens * hidden`` values less in memory. On a CPU,
            where the reference runs, PyTorch saves them either way.

    Returns:
        ``(..., out)``, contiguous, of ``residual``'s dtype, else ``x``'s; under autocast everything
        but the residual is cast to its dtype.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, layout, device or activation that is not accepted.
    """
    layers = Layers(w_fc, b_fc, w_proj, b_proj)
    return mlp(GATED, reference.gated_mlp, x, layers, activation, residual, recompute)
