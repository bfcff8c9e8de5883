"""Argument errors of ``linear_cross_entropy``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import autocast_dtype, traced

OP = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


class Head(NamedTuple):
    """A head and its classes: ``weight (vocab, width)``, ``bias`` and ``ce_weight (vocab,)`` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    ce_weight: torch.Tensor | None


class Settings(NamedTuple):
    """A call's arguments that are no tensors.

    Attributes:
        softcap: 0 means none.
        accuracy: Whether the token accuracy is computed.
        compute: The dtype of the matrix products; None is autocast's, if any.
    """

    ignore_index: int
    reduction: str
    z_loss: float
    label_smoothing: float
    softcap: float
    accuracy: bool
    compute: torch.dtype | None


def check(hidden: torch.Tensor, head: Head, targets: torch.Tensor, settings: Settings) -> None:
    """Raise for arguments that are not accepted."""
    accepted = _checks_of_tensors(hidden, head, targets, settings.compute)
    compute = settings.compute
    if compute is not None and compute not in accepted:
        raise TypeError(f"{OP}: compute is {compute}; a floating dtype that hidden may have is needed")
    _checks.choice(OP, "reduction", settings.reduction, REDUCTIONS)
    _checks.whole(OP, "ignore_index", settings.ignore_index, None)
    if not 0.0 <= settings.label_smoothing <= 1.0:
        raise ValueError(f"{OP}: label_smoothing is {settings.label_smoothing}; 0 to 1 is accepted")
    if not settings.z_loss >= 0.0:
        raise ValueError(f"{OP}: z_loss is {settings.z_loss}; 0 or more is accepted")
    if not 0.0 <= settings.softcap < math.inf:
        raise ValueError(f"{OP}: softcap is {settings.softcap}; a positive number is needed, or None")
    if targets.device.type == "cpu" and not traced(targets):
        _check_targets(targets, settings.ignore_index, head.weight.shape[0])


def _check_targets(targets: torch.Tensor, ignore_index: int, vocab: int) -> None:
    outside = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab))]
    if outside.numel():
        raise ValueError(
            f"{OP}: targets holds {outside[0].item()}; 0 to {vocab - 1} or "
            f"ignore_index {ignore_index} is accepted"
        )


def _checks_of_tensors(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, compute: torch.dtype | None
) -> tuple[torch.dtype, ...]:
    """The dtypes that hidden may have."""
    weight = head.weight
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
    for name, value in (("bias", head.bias), ("ce_weight", head.ce_weight)):
        if value is not None:
            _checks.tensor(OP, name, value)
            _checks.dtype(OP, name, value, accepted)
            _checks.shape(OP, name, value, weight.shape[:1], "one for each of weight's rows")
            _checks.last_dim_contiguous(OP, name, value)
            _checks.same_device(OP, hidden=hidden, **{name: value})
    if head.ce_weight is not None and head.ce_weight.requires_grad:
        raise ValueError(f"{OP}: ce_weight requires a gradient, which is not computed: detach it")
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
    return accepted
