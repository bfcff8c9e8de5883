"""Argument errors of ``linear_cross_entropy``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import autocast_dtype, traced

OP = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


class Settings(NamedTuple):
    """A call's arguments that are no tensors, and ``compute``, the dtype of its matrix products."""

    ignore_index: int
    reduction: str
    z_loss: float
    label_smoothing: float
    compute: torch.dtype | None


def check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    settings: Settings,
) -> None:
    """Raise for arguments that are not accepted; ``compute`` None is autocast's dtype, if any."""
    ignore_index, reduction, z_loss, label_smoothing, compute = settings
    _checks.tensor(OP, "hidden", hidden)
    _checks.tensor(OP, "weight", weight, dim=2)
    _checks.tensor(OP, "targets", targets)
    if hidden.dim() < 2:
        raise ValueError(f"{OP}: hidden has shape {tuple(hidden.shape)}; (..., width) is needed")
    accepted = _checks.KERNEL_FLOATS if hidden.device.type == "cuda" else _checks.FLOATS
    _checks.dtype(OP, "hidden", hidden, accepted)
    _checks.dtype(OP, "weight", weight, accepted)
    if hidden.dtype != weight.dtype and (compute or autocast_dtype(hidden)) is None:
        raise TypeError(f"{OP}: weight is {weight.dtype}, hidden {hidden.dtype}: they must be the same")
    _checks.dtype(OP, "targets", targets, (torch.int64,))
    _checks.same_device(OP, hidden=hidden, weight=weight, targets=targets)
    if bias is not None:
        _checks.tensor(OP, "bias", bias)
        _checks.dtype(OP, "bias", bias, accepted)
        _checks.shape(OP, "bias", bias, weight.shape[:1], "one for each of weight's rows")
        _checks.last_dim_contiguous(OP, "bias", bias)
        _checks.same_device(OP, hidden=hidden, bias=bias)
    if not weight.shape[0] or not weight.shape[1]:
        raise ValueError(f"{OP}: weight has shape {tuple(weight.shape)}; at least one word and one column")
    _checks.shape(OP, "hidden", hidden, (*hidden.shape[:-1], weight.shape[1]), "weight's width")
    _checks.shape(OP, "targets", targets, hidden.shape[:-1], "hidden's leading dimensions")
    _checks.last_dim_contiguous(OP, "hidden", hidden)
    _checks.last_dim_contiguous(OP, "weight", weight)
    try:
        hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{OP}: hidden has strides {hidden.stride()}; its leading dimensions must be viewable as one: "
            "call hidden.contiguous() if a copy is acceptable"
        ) from None
    if compute is not None and compute not in accepted:
        raise TypeError(f"{OP}: compute is {compute}; a floating dtype that hidden may have is needed")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction is {reduction!r}; accepted are {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{OP}: label_smoothing is {label_smoothing}; 0 to 1 is accepted")
    if not z_loss >= 0.0:
        raise ValueError(f"{OP}: z_loss is {z_loss}; 0 or more is accepted")
    if targets.device.type == "cpu" and not traced(targets):
        outside = targets[(targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))]
        if outside.numel():
            raise ValueError(
                f"{OP}: targets holds {outside[0].item()}; 0 to {weight.shape[0] - 1} or "
                f"ignore_index {ignore_index} is accepted"
            )
