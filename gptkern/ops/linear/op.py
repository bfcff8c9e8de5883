"""Linear layers with a fused epilogue: bias and activation, bias and residual."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import autocast_dtype, call_key, needs_grad, traced, use_kernel
from gptkern.ops._launch import CHECKED, Plans, on_device, repeated
from gptkern.ops.linear import checks, launch, reference
from gptkern.ops.linear.register import Linear

_plans: Plans[Any] = Plans()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``. Arguments, result and errors are those of ``linear_act``."""
    return _linear("linear", x, weight, bias, None, "none")


def linear_act(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str = "gelu_tanh"
) -> torch.Tensor:
    """``activation(x @ weight.T + bias)``, bias and activation in the product's epilogue.

    Products accumulate in fp32 and are rounded once, after the activation. A row's result does not
    depend on the other rows. For the backward pass the pre-activation is saved in ``x``'s dtype.

    Args:
        x: ``(..., in)``, fp32, fp16 or bf16 (float64 on a CPU). Any strides whose leading
            dimensions merge into one.
        weight: ``(out, in)`` of the same dtype, any strides: weights stored ``(in, out)`` are passed
            as ``weight.t()``, without a copy, and their gradient comes in the same layout.
        bias: ``(out,)`` of the same dtype, or None.
        activation: ``"gelu_tanh"``, ``"gelu"`` (by erf), ``"relu"``, ``"silu"`` or ``"none"``.

    Returns:
        ``(..., out)``, contiguous, of ``x``'s dtype; under autocast everything is cast to its dtype.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, layout, device or activation that is not accepted.
    """
    checks.activation("linear_act", activation)
    return _linear("linear_act", x, weight, bias, None, activation)


def linear_residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """``residual + x @ weight.T + bias``, bias and residual in the product's epilogue.

    Args:
        x, weight, bias: as for ``linear_act``.
        residual: ``(..., out)``, any strides whose leading dimensions merge into one; of ``x``'s
            dtype, or fp32 beside fp16 and bf16 (a residual stream in fp32).

    Returns:
        ``(..., out)``, contiguous, of ``residual``'s dtype.

    Raises:
        TypeError, ValueError: as ``linear_act``.
    """
    _checks.tensor("linear_residual", "residual", residual)
    return _linear("linear_residual", x, weight, bias, residual, "none")


Operand = TypeVar("Operand", torch.Tensor, torch.Tensor | None)


def cast(value: Operand, dtype: torch.dtype | None) -> Operand:
    """An operand of a matrix product in autocast's ``dtype``; float64 and None are left alone."""
    if dtype is None or value is None or value.dtype == torch.float64:
        return value
    return value.to(dtype)


def _linear(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    tensors = x, weight, bias, residual
    key = call_key(tensors, activation)
    if _plans.get(key) is None:
        checks.tensors(op, x=x, weight=weight, bias=bias, residual=residual)
        dtype = autocast_dtype(x)
        x, weight, bias = cast(x, dtype), cast(weight, dtype), cast(bias, dtype)
        checks.layer(op, x, x.shape[-1], ("weight", "bias"), weight, bias)
        if residual is not None:
            checks.residual(op, x, residual, weight.shape[0])
        if not use_kernel(x):
            if residual is not None:
                return reference.linear_residual(x, weight, bias, residual)
            return reference.linear_act(x, weight, bias, activation)
        checks.kernel_inputs(op, weight.shape[0], x=x, residual=residual)
        if traced(x):
            save_pre = needs_grad(x, weight, bias, residual) and activation != "none"
            out: torch.Tensor = torch.ops.gptkern.linear(x, weight, bias, residual, activation, save_pre)[0]
            return out
        tensors = x, weight, bias, residual
        _plans.keep(key, CHECKED)
    if needs_grad(*tensors):
        out = Linear.apply(*tensors, activation)
        return out
    with on_device(x):
        new = repeated(_plans, key, tensors, lambda: launch.forward(*tensors, activation, False)[:1])
    out = new[0]
    return out
