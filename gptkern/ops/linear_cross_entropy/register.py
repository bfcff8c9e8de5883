"""``linear_cross_entropy`` as PyTorch sees it: autograd function, registered ops, fake kernels, gradient."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._register import kernel_backward, register
from gptkern.ops.linear_cross_entropy import launch
from gptkern.ops.linear_cross_entropy.checks import OP, Head, Settings, check
from gptkern.ops.linear_cross_entropy.launch import Needs

Maybe = torch.Tensor | None


class LinearCrossEntropy(torch.autograd.Function):
    """The launches under eager autograd, without the dispatcher's cost for registered ops."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: Maybe,
        ce_weight: Maybe,
        targets: torch.Tensor,
        settings: Settings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        needs, head = Needs(*ctx.needs_input_grad[:3]), Head(weight, bias, ce_weight)
        loss, z_loss, accuracy, *grads = launch.forward(hidden, head, targets, settings, needs)
        _save(ctx, (hidden, *head, targets), tuple(grads), settings, needs)
        ctx.mark_non_differentiable(z_loss, accuracy)
        return loss, z_loss, accuracy

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Maybe, ...]:
        return *_grads(ctx, grad, launch.backward_per_token), None, None, None


def _save(
    ctx: Any, inputs: tuple[Maybe, ...], grads: tuple[torch.Tensor, ...], settings: Settings, needs: Needs
) -> None:
    """Save the gradients of a scalar loss, or the inputs to compute those of one loss a token."""
    ctx.settings, ctx.needs = settings, needs
    ctx.save_for_backward(*(inputs if settings.reduction == "none" else grads))


def _grads(ctx: Any, grad: torch.Tensor, per_token: Any) -> tuple[Maybe, Maybe, Maybe]:
    """(dhidden, dweight, dbias); ``per_token`` computes them for ``reduction="none"``."""
    if ctx.settings.reduction == "none":
        hidden, *head, targets = ctx.saved_tensors
        grads = per_token(grad, hidden, Head(*head), targets, ctx.settings, ctx.needs)
    else:
        # Not in place: with retain_graph the backward pass may run twice.
        grads = tuple(saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
    dhidden, dweight, dbias = (value if need else None for value, need in zip(grads, ctx.needs, strict=True))
    return dhidden, dweight, dbias


def arguments(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, settings: Settings, needs: Needs
) -> tuple[Any, ...]:
    """A call as the schemas name its arguments."""
    return hidden, head.weight, targets, head.bias, head.ce_weight, *settings, *needs


def _split(weight: torch.Tensor, rest: tuple[Any, ...]) -> tuple[Head, Settings, Needs]:
    """The head, settings and needs of the schemas' arguments."""
    return Head(weight, *rest[:2]), Settings(*rest[2:-3]), Needs(*rest[-3:])


def _empty(like: torch.Tensor, shape: Any, needed: bool) -> torch.Tensor:
    return like.new_empty(shape if needed else (0,))


def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    head, settings, needs = _split(weight, rest)
    check(hidden, head, targets, settings)
    return launch.forward(hidden, head, targets, settings, needs)


def _fake_forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    head, settings, needs = _split(weight, rest)
    per_token = settings.reduction == "none"
    shape = targets.shape if per_token else ()
    shapes = (shape, shape, shape if settings.accuracy else (0,))
    losses = (hidden.new_empty(size, dtype=torch.float32) for size in shapes)
    computed = Needs(False, False, False) if per_token else needs
    return *losses, *_fake_grads(hidden, head, computed)


def _fake_grads(
    hidden: torch.Tensor, head: Head, needs: Needs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, like = head.weight, head.weight if head.bias is None else head.bias
    return (
        _empty(hidden, hidden.shape, needs.hidden),
        _empty(weight, weight.shape, needs.weight),
        _empty(like, weight.shape[:1], needs.bias),
    )


def _backward(
    grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    head, settings, needs = _split(weight, rest)
    check(hidden, head, targets, settings)
    _checks.shape(OP, "grad", grad, targets.shape, "one a token")
    _checks.same_device(OP, grad=grad, hidden=hidden)
    return launch.backward_per_token(grad, hidden, head, targets, settings, needs)


def _fake_backward(
    grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    head, _, needs = _split(weight, rest)
    return _fake_grads(hidden, head, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, *rest = inputs
    head, settings, needs = _split(weight, tuple(rest))
    _save(ctx, (hidden, *head, targets), output[3:], settings, needs)


def _registered_per_token(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    settings: Settings,
    needs: Needs,
) -> Any:
    op = torch.ops.gptkern.linear_cross_entropy_backward
    return op(grad, *arguments(hidden, head, targets, settings, needs))


def _registered_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Maybe, ...]:
    dhidden, dweight, dbias = _grads(ctx, grad, _registered_per_token)
    return dhidden, dweight, None, dbias, *(None,) * 11


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? ce_weight, int ignore_index, "
    "str reduction, float z_loss, float label_smoothing, float softcap, bool accuracy, ScalarType compute, "
    "bool hidden_grad, bool weight_grad, bool bias_grad"
)
register(
    f"linear_cross_entropy({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_registered_backward,
)
register(
    f"linear_cross_entropy_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
)
