"""``linear`` as PyTorch sees it: autograd function, registered ops, their fake kernels and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import kernel_backward, register, tensor_or_empty
from gptkern.ops.linear import checks, launch, reference
from gptkern.ops.linear.launch import Saved

Maybe = torch.Tensor | None


def _saved(ctx: Any) -> Saved:
    x, weight, pre = ctx.saved_tensors
    return Saved(x, weight, pre, ctx.activation)


class Linear(torch.autograd.Function):
    """The launches under eager autograd, without the dispatcher's cost for registered ops."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Maybe, residual: Maybe, activation: str
    ) -> torch.Tensor:
        out, pre = launch.forward(x, weight, bias, residual, activation, activation != "none")
        ctx.save_for_backward(x, weight, pre)
        ctx.activation = activation
        return out

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        grads = launch.backward(dout, _saved(ctx), needs[:3])
        return *grads, dout if needs[3] else None, None


def needed_grads(
    grads: tuple[Maybe, ...], needs: tuple[bool, ...], like: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The outputs of a registered backward op: empty for a gradient that nobody needs."""
    pairs = zip(grads, needs, strict=True)
    return tuple(tensor_or_empty(grad if needed else None, like) for grad, needed in pairs)


def registered_grads(
    backward: Any, saved: Callable[[Any], tuple[Any, ...]], needs: tuple[bool, ...], ctx: Any, dout: Maybe
) -> tuple[Any, ...]:
    """The gradients of a registered layer's inputs: its tensors', the residual's, and None for two settings.

    Args:
        backward: The registered backward op, called with dout, ``saved(ctx)`` and ``needs``.
        needs: Whether each of the layer's tensors needs a gradient; the input after them is the residual.
    """
    grads: tuple[Maybe, ...] = (None,) * len(needs)
    if dout is None:
        return *grads, None, None, None
    if any(needs):
        outputs = backward(dout, *saved(ctx), needs)
        grads = tuple(grad if needed else None for grad, needed in zip(outputs, needs, strict=True))
    return *grads, dout if ctx.needs_input_grad[len(needs)] else None, None, None


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, residual: Maybe, activation: str, save_pre: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "linear"
    checks.activation(op, activation)
    checks.tensors(op, x=x, weight=weight, bias=bias, residual=residual)
    checks.layer(op, x, x.shape[-1], ("weight", "bias"), weight, bias)
    if residual is not None:
        checks.residual(op, x, residual, weight.shape[0])
    if use_kernel(x):
        checks.kernel_inputs(op, weight.shape[0], x=x, residual=residual)
        out, pre = launch.forward(x, weight, bias, residual, activation, save_pre)
    else:
        unactivated = reference.linear_act(x, weight, bias, "none")
        out = reference.ACTIVATIONS[activation](unactivated)
        out = out if residual is None else residual + out
        pre = launch.matrix(unactivated)
    return out, tensor_or_empty(pre if save_pre else None, x)


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, residual: Maybe, activation: str, save_pre: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    features = weight.shape[0]
    out = x.new_empty(*x.shape[:-1], features, dtype=x.dtype if residual is None else residual.dtype)
    return out, x.new_empty(math.prod(x.shape[:-1]), features) if save_pre else x.new_empty(0)


def _backward(dout: torch.Tensor, *saved_and_needs: Any) -> tuple[torch.Tensor, ...]:
    *values, needs = saved_and_needs
    saved = Saved(*values)
    op, x, weight = "linear_backward", saved.x, saved.weight
    checks.activation(op, saved.activation)
    checks.tensors(op, dout=dout, x=x, weight=weight)
    checks.layer(op, x, x.shape[-1], ("weight", ""), weight, None)
    _checks.shape(op, "dout", dout, (*x.shape[:-1], weight.shape[0]))
    checks.saved(op, x, weight.shape[0], pre=saved.pre)
    grads: tuple[Maybe, ...]
    if use_kernel(x):
        checks.kernel_inputs(op, weight.shape[0], x=x)
        grads = launch.backward(dout, saved, needs)
    else:
        dout_rows = launch.matrix_of_grad(dout, x.dtype)
        pre = dout_rows if saved.pre is None else saved.pre
        dx, dweight, dbias = reference.linear_backward(
            dout_rows, launch.matrix(x), weight, pre, saved.activation
        )
        grads = dx.view(x.shape), torch.empty_like(weight).copy_(dweight), dbias
    return needed_grads(grads, needs, x)


def _fake_backward(dout: torch.Tensor, *saved_and_needs: Any) -> tuple[torch.Tensor, ...]:
    *values, needs = saved_and_needs
    saved = Saved(*values)
    x, weight = saved.x, saved.weight
    grads = x.new_empty(x.shape), torch.empty_like(weight), x.new_empty(weight.shape[0])
    return needed_grads(grads, needs, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, _, activation, save_pre = inputs
    ctx.save_for_backward(x, weight, output[1] if save_pre else None)
    ctx.activation = activation
    ctx.set_materialize_grads(False)  # no zeros the size of pre for its gradient, which nobody needs


def _grads(ctx: Any, dout: Maybe, _: Maybe) -> tuple[Any, ...]:
    backward = torch.ops.gptkern.linear_backward
    return registered_grads(backward, _saved, ctx.needs_input_grad[:3], ctx, dout)


register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool save_pre)"
    " -> (Tensor, Tensor)",
    _forward,
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_grads,
)
register(
    "linear_backward(Tensor dout, Tensor x, Tensor weight, Tensor? pre, str activation, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
)
