"""Parameters whose rows lie end to end in one memory, so that ops read them as one matrix without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gptkern.ops._dispatch import needs_grad, traced


def stacked(parts: list[nn.Parameter]) -> torch.Tensor:
    """One tensor of the parameters' rows, in their own memory: they are moved unless they lie end to end."""
    if len(parts) == 1:
        return parts[0]
    whole = _spanning(parts)
    if whole is None:
        whole = torch.cat([part.detach() for part in parts])
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = rows
    return whole


def joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The rows of parts that lie end to end, whose gradients go to the parts; None if they do not."""
    tensors = [part for part in parts if part is not None]
    # A part of another type (DTensor) lies elsewhere than its address says, and a traced one nowhere.
    plain = all(type(part) in (torch.Tensor, nn.Parameter) for part in tensors)
    if len(tensors) != len(parts) or not plain or traced(tensors[0]):
        return None
    whole = _spanning(tensors)
    if whole is None or not needs_grad(*tensors):
        return whole
    rows: torch.Tensor = _Joined.apply(*tensors)
    return rows


class _Joined(torch.autograd.Function):
    """Parts that lie end to end as one tensor."""

    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        whole = _spanning(parts)
        assert whole is not None
        # Nobody computes with them: a part written before the backward pass is an error, as it is by itself.
        ctx.save_for_backward(*parts)
        # No view to autograd, whose errors would speak of views in custom functions in place of the weight.
        return whole.data

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (grad,) = grads
        return tuple(grad.split([len(part) for part in ctx.saved_tensors]))


def _spanning(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The parts as one view, if they lie end to end in one memory."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == end):
            return None
        end += part.numel()
    rows = sum(len(part) for part in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
