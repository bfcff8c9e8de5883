"""The loss without kernels; where gradients are needed the forward pass makes them, chunk by chunk of tokens.

Each logit is multiplied out once, and no chunk's logits outlive it; the backward pass scales the gradients.
With ``reduction="none"`` the upstream gradient differs from token to token, and in float16 a loss scale must
be in the products before they are rounded: both are left to the reference, whose backward pass computes the
chunks again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gptkern.ops._dispatch import autocast_dtype, needs_grad, traced
from gptkern.ops.linear_cross_entropy import reference
from gptkern.ops.linear_cross_entropy.checks import Head
from gptkern.ops.linear_cross_entropy.reference import Losses, Maybe, Settings

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Dtypes with the range of fp32, in which a gradient without its upstream factor does not vanish.
WIDE_RANGE = (torch.float32, torch.float64, torch.bfloat16)


def linear_cross_entropy(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    settings: Settings,
    reduction: str,
    accuracy: bool,
) -> Result:
    """``reference.linear_cross_entropy``, its gradients made in the forward pass where that is possible."""
    compute = hidden.dtype if hidden.dtype == torch.float64 else autocast_dtype(hidden) or hidden.dtype
    several = targets.numel() > reference.chunk_tokens(head.weight.shape[0])
    known = reduction != "none" and compute in WIDE_RANGE
    if known and several and needs_grad(hidden, head.weight, head.bias) and not traced(hidden):
        chosen = (settings, reduction, accuracy, compute)
        result: Result = ChunkedLoss.apply(hidden, *head, targets, *chosen)
        return result
    return reference.linear_cross_entropy(hidden, *head, targets, settings, reduction, accuracy)


class ChunkedLoss(torch.autograd.Function):
    """(loss, its part that is z-loss, token accuracy) of several chunks; only the loss has gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: Maybe,
        ce_weight: Maybe,
        targets: torch.Tensor,
        settings: Settings,
        reduction: str,
        accuracy: bool,
        compute: torch.dtype,
    ) -> Result:
        ctx.chosen, ctx.compute = (settings, reduction, accuracy), compute
        head = Head(weight.to(compute), bias, ce_weight)
        rows, target_rows = hidden.flatten(0, -2).to(compute), targets.flatten()
        sums = _Sums(
            rows, head, ctx.needs_input_grad, reference.divisors(target_rows, ce_weight, *ctx.chosen[:2])
        )
        chunk = reference.chunk_tokens(len(weight))
        pieces = [
            sums.add(first, target_rows[first : first + chunk], settings, accuracy)
            for first in range(0, len(rows), chunk)
        ]
        found = zip((sums.hidden, sums.weight, sums.bias), (hidden, weight, bias), strict=True)
        grads = [g if g is None or like is None else g.view_as(like).to(like.dtype) for g, like in found]
        ctx.save_for_backward(hidden, weight, bias, ce_weight, targets, *grads)
        result = reference.reduced(reference.joined(pieces), target_rows, ce_weight, settings, reduction)
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Maybe, ...]:
        *inputs, dhidden, dweight, dbias = ctx.saved_tensors
        saved = (dhidden, dweight, dbias)
        if torch.is_grad_enabled():
            saved = _differentiable(ctx, inputs)
        # Not in place: with retain_graph the backward pass may run twice.
        scaled = [None if value is None else value * grad.to(value.dtype) for value in saved]
        return *scaled, *(None,) * 6


class _Sums:
    """The gradients of a sum of losses, which chunks of tokens are added to.

    Attributes:
        hidden: ``(tokens, width)``, or None where it is not needed, as all.
        weight, bias: ``(vocab, width)`` and ``(vocab,)``, in fp32 or float64 whatever the inputs.
    """

    def __init__(
        self, rows: torch.Tensor, head: Head, needs: Any, divisors: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        wide = torch.promote_types(rows.dtype, torch.float32)
        self._rows, self._head, self._divisors = rows, head, divisors
        self.hidden = torch.empty_like(rows) if needs[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=wide) if needs[1] else None
        self.bias = rows.new_zeros(len(head.weight), dtype=wide) if needs[2] else None

    def add(self, first: int, targets: torch.Tensor, settings: Settings, accuracy: bool) -> Losses:
        """Add the gradients of the tokens from ``first`` on; their losses."""
        rows = self._rows[first : first + len(targets)]
        products = F.linear(rows, self._head.weight).requires_grad_()
        bias = self._head.bias
        leaves = [products]
        if self.bias is not None and bias is not None:
            bias = bias.detach().requires_grad_()
            leaves.append(bias)
        with torch.enable_grad():
            classes = self._head.ce_weight
            losses = reference.product_losses(products, bias, classes, targets, settings, accuracy)
            total = losses.loss.sum() / self._divisors[0] + losses.z_loss.sum() / self._divisors[1]
            found = torch.autograd.grad(total, leaves)
        if self.hidden is not None:
            torch.mm(found[0], self._head.weight, out=self.hidden[first : first + len(targets)])
        if self.weight is not None and self.weight.dtype == rows.dtype:
            self.weight.addmm_(found[0].t(), rows)
        elif self.weight is not None:
            self.weight += found[0].t() @ rows
        if self.bias is not None:
            self.bias += found[1]
        return Losses(*(part.detach() for part in losses))


def _differentiable(ctx: Any, inputs: list[Any]) -> tuple[Maybe, Maybe, Maybe]:
    """The gradients by the reference, for who differentiates them once more."""
    hidden, weight, bias, ce_weight, targets = inputs
    leaves = [t for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True) if needed]
    head = (weight.to(ctx.compute), bias, ce_weight)
    loss, *_ = reference.linear_cross_entropy(hidden.to(ctx.compute), *head, targets, *ctx.chosen)
    found = iter(torch.autograd.grad(loss, leaves, create_graph=True))
    dhidden, dweight, dbias = (next(found) if needed else None for needed in ctx.needs_input_grad[:3])
    return dhidden, dweight, dbias
