"""Layer normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

import math
from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import autocast_dtype, call_key, needs_grad, traced, use_kernel
from gptkern.ops._launch import Plans
from gptkern.ops.layer_norm import launch, reference
from gptkern.ops.layer_norm.checks import check, check_kernel
from gptkern.ops.layer_norm.launch import Forward, Settings, forward_plan
from gptkern.ops.layer_norm.register import Norm

Maybe = torch.Tensor | None

_plans: Plans[Forward] = Plans()


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dims: int = 1,
) -> torch.Tensor:
    """Layer normalisation over the last dimension, or the last few (Ba, Kiros and Hinton 2016).

    ``(x - mean) / sqrt(variance + eps) * weight + bias``, with statistics in fp32 whatever the dtypes.

    Args:
        x: ``(..., width)``, width 1 to 65536; fp32, fp16 or bf16 (float64 on a CPU). The last
            dimension is contiguous; the leading ones must collapse to at most two strided loops, and a
            stride of 0 is allowed.
        weight: ``(width,)``, of the same or another floating dtype; None: none.
        bias: ``(width,)`` or None; not without a weight.
        eps: Added to the variance.
        dims: How many trailing dimensions of ``x`` are normalised as one, of width elements in all; weight
            and bias then have these dimensions. They must merge without a copy.

    Returns:
        Contiguous, of ``x``'s shape and dtype; under autocast of autocast's dtype.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, layout or device that is not accepted.
    """
    if dims != 1:
        shape = x.shape if isinstance(x, torch.Tensor) else ()
        x, weight, bias = merge_dims("layer_norm", dims, x=x, weight=weight, bias=bias)
        return layer_norm(x, weight, bias, eps).view(shape)
    key = call_key((x, weight, bias), eps)
    plan = _plans.get(key)
    if plan is not None:
        return norm(plan, x, weight, bias)
    check("layer_norm", x, None, weight, bias, eps)
    dtype = out_dtype(x, None)
    if not use_kernel(x):
        return reference.layer_norm(x, weight, bias, eps).to(dtype)
    check_kernel("layer_norm", x=x, weight=weight, bias=bias)
    if traced(x):
        out: torch.Tensor = torch.ops.gptkern.layer_norm(x, weight, bias, eps, dtype)[0]
        return out
    settings = Settings("layer_norm", True, eps, 0.0, dtype)
    return norm(_plans.keep(key, forward_plan(x, None, settings)), x, weight, bias)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
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
    key = call_key((x, residual, weight, bias), eps, dropout_p)
    plan = _plans.get(key)
    if plan is not None:
        return add_norm(plan, x, residual, weight, bias)
    check("add_layer_norm", x, residual, weight, bias, eps, dropout_p)
    dtype = out_dtype(x, residual)
    if not use_kernel(x):
        normed, total = reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p)
        return normed.to(dtype), total
    check_kernel("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    if traced(x):
        op = torch.ops.gptkern.add_layer_norm
        seed = new_seed(x, dropout_p)
        normed, total, _ = op(x, residual, weight, bias, eps, dropout_p, seed, dtype)
        return normed, total
    settings = Settings("add_layer_norm", True, eps, dropout_p, dtype)
    return add_norm(_plans.keep(key, forward_plan(x, residual, settings)), x, residual, weight, bias)


# Shared with RMS norm.


def merge_dims(op: str, dims: int, **values: Maybe) -> Any:
    """The tensors with their last ``dims`` dimensions as one, without a copy; None stays."""
    merged = []
    for name, value in values.items():
        if value is not None:
            _checks.tensor(op, name, value)
            if not 1 <= dims <= value.dim():
                raise ValueError(
                    f"{op}: dims is {dims}, {name} has shape {tuple(value.shape)}: "
                    f"1 to {value.dim()} is accepted"
                )
            try:
                value = value.view(*value.shape[:-dims], math.prod(value.shape[-dims:]))
            except RuntimeError:
                raise ValueError(
                    f"{op}: {name} has shape {tuple(value.shape)} and strides {value.stride()}; its last "
                    f"{dims} dimensions must merge into one: call {name}.contiguous() if a copy is acceptable"
                ) from None
        merged.append(value)
    return merged


def out_dtype(x: torch.Tensor, residual: Maybe) -> torch.dtype:
    """The dtype of the normalised rows: autocast's, else that of the rows before normalisation."""
    cast = autocast_dtype(x)
    if cast is not None and x.dtype is not torch.float64:
        return cast
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def new_seed(x: torch.Tensor, dropout_p: float) -> Maybe:
    """A seed on ``x``'s device: drawn without synchronisation, and anew at each replay of a CUDA graph."""
    return torch.randint(2**62, (1,), device=x.device) if dropout_p > 0.0 else None


def norm(plan: Forward, x: torch.Tensor, weight: Maybe, bias: Maybe) -> torch.Tensor:
    """The norm by the kernels, eagerly."""
    if needs_grad(x, weight, bias):
        out: torch.Tensor = Norm.apply(x, None, weight, bias, None, plan)
        return out
    return launch.forward(plan, x, None, weight, bias, None, False)[0]


def add_norm(
    plan: Forward, x: torch.Tensor, residual: torch.Tensor, weight: Maybe, bias: Maybe
) -> tuple[torch.Tensor, torch.Tensor]:
    """The addition and the norm by the kernels, eagerly."""
    seed = new_seed(x, plan.settings.dropout_p)
    if needs_grad(x, residual, weight, bias):
        normed, total = Norm.apply(x, residual, weight, bias, seed, plan)
        return normed, total
    normed, total, _ = launch.forward(plan, x, residual, weight, bias, seed, False)
    return normed, total
