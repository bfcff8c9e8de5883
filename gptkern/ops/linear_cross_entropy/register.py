"""``linear_cross_entropy`` as PyTorch sees it: autograd function, registered ops, fake kernels, gradient."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._register import register
from gptkern.ops.linear_cross_entropy import launch
from gptkern.ops.linear_cross_entropy.checks import OP, Settings, check
from gptkern.ops.linear_cross_entropy.launch import Head, Needs

Maybe = torch.Tensor | None


class LinearCrossEntropy(torch.autograd.Function):
    """The launches under eager autograd, without the dispatcher's cost for registered ops."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: Maybe,
        targets: torch.Tensor,
        settings: Settings,
    ) -> torch.Tensor:
        needs = Needs(*ctx.needs_input_grad[:3])
        loss, *grads = launch.forward(hidden, Head(weight, bias), targets, settings, needs)
        _save(ctx, (hidden, weight, bias, targets), tuple(grads), settings, needs)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
        return *_grads(ctx, grad, launch.backward_per_token), None, None


def _save(
    ctx: Any, inputs: tuple[Maybe, ...], grads: tuple[torch.Tensor, ...], settings: Settings, needs: Needs
) -> None:
    """Save the gradients of a scalar loss, or the inputs to compute those of one loss a token."""
    ctx.settings, ctx.needs = settings, needs
    ctx.save_for_backward(*(inputs if settings.reduction == "none" else grads))


def _grads(ctx: Any, grad: torch.Tensor, per_token: Any) -> tuple[Maybe, Maybe, Maybe]:
    """(dhidden, dweight, dbias); ``per_token`` computes them for ``reduction="none"``."""
    if ctx.settings.reduction == "none":
        hidden, weight, bias, targets = ctx.saved_tensors
        grads = per_token(grad, hidden, Head(weight, bias), targets, ctx.settings, ctx.needs)
    else:
        # Not in place: with retain_graph the backward pass may run twice.
        grads = tuple(saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
    dhidden, dweight, dbias = (value if need else None for value, need in zip(grads, ctx.needs, strict=True))
    return dhidden, dweight, dbias


def _split(rest: tuple[Any, ...]) -> tuple[Settings, Needs, Maybe]:
    """The settings, needs and bias of the schemas' arguments; the bias and its need may be left out."""
    settings, (hidden_grad, weight_grad) = Settings(*rest[:5]), rest[5:7]
    bias, bias_grad = (*rest[7:], None, False)[:2]
    return settings, Needs(hidden_grad, weight_grad, bool(bias_grad)), bias


def _empty(like: torch.Tensor, shape: Any, needed: bool) -> torch.Tensor:
    return like.new_empty(shape if needed else (0,))


def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    settings, needs, bias = _split(rest)
    check(hidden, weight, bias, targets, settings)
    return launch.forward(hidden, Head(weight, bias), targets, settings, needs)


def _fake_forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    settings, needs, bias = _split(rest)
    per_token = settings.reduction == "none"
    loss = hidden.new_empty(targets.shape if per_token else (), dtype=torch.float32)
    computed = Needs(False, False, False) if per_token else needs
    return loss, *_fake_grads(hidden, weight, bias, computed)


def _fake_grads(
    hidden: torch.Tensor, weight: torch.Tensor, bias: Maybe, needs: Needs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like = weight if bias is None else bias
    return (
        _empty(hidden, hidden.shape, needs.hidden),
        _empty(weight, weight.shape, needs.weight),
        _empty(like, weight.shape[:1], needs.bias),
    )


def _backward(
    grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    settings, needs, bias = _split(rest)
    check(hidden, weight, bias, targets, settings)
    _checks.shape(OP, "grad", grad, targets.shape, "one a token")
    _checks.same_device(OP, grad=grad, hidden=hidden)
    return launch.backward_per_token(grad, hidden, Head(weight, bias), targets, settings, needs)


def _fake_backward(
    grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    _, needs, bias = _split(rest)
    return _fake_grads(hidden, weight, bias, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, *rest = inputs
    settings, needs, bias = _split(tuple(rest))
    _save(ctx, (hidden, weight, bias, targets), output[1:], settings, needs)


def _registered_per_token(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    settings: Settings,
    needs: Needs,
) -> Any:
    op = torch.ops.gptkern.linear_cross_entropy_backward
    return op(grad, hidden, head.weight, targets, *settings, *needs[:2], head.bias, needs.bias)


def _registered_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Maybe, ...]:
    dhidden, dweight, dbias = _grads(ctx, grad, _registered_per_token)
    return dhidden, dweight, *(None,) * 8, dbias, None


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor targets, int ignore_index, str reduction, float z_loss, "
    "float label_smoothing, ScalarType compute, bool hidden_grad, bool weight_grad, Tensor? bias=None, "
    "bool bias_grad=False"
)
register(
    f"linear_cross_entropy({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
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
