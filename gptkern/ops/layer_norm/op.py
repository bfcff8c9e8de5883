"""Layer normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch

from gptkern.ops._dispatch import needs_grad, traced, use_kernel
from gptkern.ops.layer_norm import autograd, launcher, reference
from gptkern.ops.layer_norm.checks import check, check_kernel


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Layer normalisation over the last dimension (Ba, Kiros and Hinton 2016).

    ``(x - mean) / sqrt(variance + eps) * weight + bias``, with statistics in fp32 whatever the dtypes.

    Args:
        x: ``(..., width)``, width 1 to 65536; fp32, fp16 or bf16 (float64 on a CPU). The last
            dimension contiguous, the others of any strides that nest in two, 0 included.
        weight: ``(width,)``, of the same or another floating dtype.
        bias: ``(width,)`` or None.
        eps: Added to the variance.

    Returns:
        Contiguous, of ``x``'s shape and dtype; under autocast of autocast's dtype.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, layout or device that is not accepted.
    """
    check("layer_norm", x, None, weight, bias)
    dtype = autograd.out_dtype(x, None)
    if not use_kernel(x):
        return reference.layer_norm(x, weight, bias, eps).to(dtype)
    check_kernel("layer_norm", x=x, weight=weight, bias=bias)
    if traced(x):
        out: torch.Tensor = torch.ops.gptkern.layer_norm(x, weight, bias, eps, dtype)[0]
    elif needs_grad(x, weight, bias):
        out = autograd.Norm.apply("layer_norm", x, None, weight, bias, eps, 0.0, None, True, dtype)
    else:
        out = launcher.forward("layer_norm", x, None, weight, bias, eps, 0.0, None, True, dtype, False)[0]
    return out


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``new_residual = residual + dropout(x)`` and its layer normalisation, in one pass over memory.

    Args:
        x: ``(..., width)``, as in ``layer_norm``.
        residual: The same shape, of the same or another floating dtype, any layout that ``x`` may have.
        weight, bias, eps: As in ``layer_norm``.
        dropout_p: Probability that an element of ``x`` is dropped, in [0, 1), rounded by the kernel
            to a multiple of 2**-16. 0 outside training.

    Returns:
        (normed, new_residual), both contiguous. ``new_residual`` has the wider of the two dtypes, and
        ``normed`` is exactly its layer norm: of the same dtype, under autocast of autocast's.

    Raises:
        TypeError, ValueError: as ``layer_norm``.
    """
    check("add_layer_norm", x, residual, weight, bias, dropout_p)
    dtype = autograd.out_dtype(x, residual)
    if not use_kernel(x):
        normed, total = reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p)
        return normed.to(dtype), total
    check_kernel("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    seed = autograd.new_seed(x, dropout_p)
    if traced(x):
        op = torch.ops.gptkern.add_layer_norm
        normed, total, _ = op(x, residual, weight, bias, eps, dropout_p, seed, dtype)
        return normed, total
    arguments = ("add_layer_norm", x, residual, weight, bias, eps, dropout_p, seed, True, dtype)
    if needs_grad(x, residual, weight, bias):
        normed, total = autograd.Norm.apply(*arguments)
        return normed, total
    normed, total, _ = launcher.forward(*arguments, False)
    return normed, total
