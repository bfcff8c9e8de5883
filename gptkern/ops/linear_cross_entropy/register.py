"""``linear_cross_entropy`` as PyTorch sees it: autograd function, registered ops, fake kernels, gradient."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._register import register
from gptkern.ops.linear_cross_entropy import launch
from gptkern.ops.linear_cross_entropy.checks import OP, Settings, check


class LinearCrossEntropy(torch.autograd.Function):
    """The launches under eager autograd, without the dispatcher's cost for registered ops."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, settings: Settings
    ) -> torch.Tensor:
        needs = ctx.needs_input_grad[:2]
        loss, dhidden, dweight = launch.forward(hidden, weight, targets, settings, *needs)
        _save(ctx, (hidden, weight, targets), (dhidden, dweight), settings, needs)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_grads(ctx, grad, launch.backward_per_token), None, None


def _save(
    ctx: Any,
    inputs: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor, ...],
    settings: Settings,
    needs: tuple[bool, bool],
) -> None:
    """Save the gradients of a scalar loss, or the inputs to compute those of one loss a token."""
    ctx.settings, ctx.needs = settings, needs
    ctx.save_for_backward(*(inputs if settings.reduction == "none" else grads))


def _grads(ctx: Any, grad: torch.Tensor, per_token: Any) -> tuple[torch.Tensor | None, ...]:
    """(dhidden, dweight, None for targets); ``per_token`` computes them for ``reduction="none"``."""
    if ctx.settings.reduction == "none":
        dhidden, dweight = per_token(grad, *ctx.saved_tensors, ctx.settings, *ctx.needs)
    else:
        # Not in place: with retain_graph the backward pass may run twice.
        dhidden, dweight = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
    return dhidden if ctx.needs[0] else None, dweight if ctx.needs[1] else None, None


def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *values, hidden_grad, weight_grad = rest
    settings = Settings(*values)
    check(hidden, weight, targets, settings)
    return launch.forward(hidden, weight, targets, settings, hidden_grad, weight_grad)


def _fake_forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *values, hidden_grad, weight_grad = rest
    per_token = Settings(*values).reduction == "none"
    return (
        hidden.new_empty(targets.shape if per_token else (), dtype=torch.float32),
        hidden.new_empty(hidden.shape if hidden_grad and not per_token else (0,)),
        weight.new_empty(weight.shape if weight_grad and not per_token else (0,)),
    )


def _backward(
    grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *values, hidden_grad, weight_grad = rest
    settings = Settings(*values)
    check(hidden, weight, targets, settings)
    _checks.shape(OP, "grad", grad, targets.shape, "one a token")
    _checks.same_device(OP, grad=grad, hidden=hidden)
    return launch.backward_per_token(grad, hidden, weight, targets, settings, hidden_grad, weight_grad)


def _fake_backward(
    grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_grad, weight_grad = rest[-2:]
    return (
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, *values, hidden_grad, weight_grad = inputs
    _save(ctx, (hidden, weight, targets), output[1:], Settings(*values), (hidden_grad, weight_grad))


def _registered_per_token(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    settings: Settings,
    *needs: bool,
) -> Any:
    return torch.ops.gptkern.linear_cross_entropy_backward(grad, hidden, weight, targets, *settings, *needs)


def _registered_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    return *_grads(ctx, grad, _registered_per_token), *(None,) * 7


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor targets, int ignore_index, str reduction, float z_loss, "
    "float label_smoothing, ScalarType compute, bool hidden_grad, bool weight_grad"
)
register(
    f"linear_cross_entropy({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_registered_backward,
)
register(
    f"linear_cross_entropy_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
)
