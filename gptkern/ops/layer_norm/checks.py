"""Argument errors of the norms."""

from __future__ import annotations

import torch

from gptkern.ops import _checks
from gptkern.ops.layer_norm.launch import MAX_WIDTH, layout

Maybe = torch.Tensor | None


def _ordinary(x: torch.Tensor, residual: Maybe, weight: Maybe, bias: Maybe) -> bool:
    """True if the call is right and like nearly every call: contiguous tensors on one device."""
    if not isinstance(x, torch.Tensor) or x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        return False
    device, width = x.device, x.shape[-1:]
    for value, shape in ((x, x.shape), (residual, x.shape), (weight, width), (bias, width)):
        if value is not None and not (
            isinstance(value, torch.Tensor)
            and value.shape == shape
            and value.dtype in _checks.FLOATS
            and value.device == device
            and value.is_contiguous()
            and not _checks.opposite(value)
        ):
            return False
    return weight is not None or bias is None


def check(
    op: str,
    x: torch.Tensor,
    residual: Maybe,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    dropout_p: float = 0.0,
) -> None:
    """Raise for arguments that a norm accepts on no device."""
    _checks.eps(op, eps)
    _checks.probability(op, "dropout_p", dropout_p)
    if _ordinary(x, residual, weight, bias):
        return
    _checks.tensor(op, "x", x)
    _checks.dtype(op, "x", x)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}; a last dimension of 1 to {MAX_WIDTH} is needed"
        )
    layout(op, "x", x)
    if weight is None and bias is not None:
        raise ValueError(f"{op}: bias is given without a weight; both, a weight alone or neither is needed")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        _checks.tensor(op, name, value)
        _checks.shape(op, name, value, x.shape[-1:], "x's last dimension")
        _checks.dtype(op, name, value)
        _checks.last_dim_contiguous(op, name, value)
        if value.device != x.device:
            _checks.same_device(op, x=x, **{name: value})
    if residual is not None:
        _checks.tensor(op, "residual", residual)
        _checks.dtype(op, "residual", residual)
        _checks.shape(op, "residual", residual, x.shape, "x's shape")
        layout(op, "residual", residual)
        _checks.same_device(op, x=x, residual=residual)


def check_kernel(op: str, **values: Maybe) -> None:
    """Raise for float64, which the references accept and the kernels do not."""
    for name, value in values.items():
        if value is not None and value.dtype is torch.float64:
            _checks.dtype(op, name, value, _checks.KERNEL_FLOATS)
