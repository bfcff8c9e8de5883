"""``linear`` as PyTorch sees it: the registered operator, its fake kernels and its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import use_kernel
from gptkern.ops.linear import checks, launcher, reference

_library = torch.library.Library("gptkern", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool save_pre)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "linear_backward(Tensor dout, Tensor x, Tensor weight, Tensor? pre, str activation, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor)"
)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "linear"
    checks.activation(op, activation)
    checks.tensors(op, x=x, weight=weight, bias=bias, residual=residual)
    checks.layer(op, x, x.shape[-1], ("weight", "bias"), weight, bias)
    if residual is not None:
        checks.residual(op, x, residual, weight.shape[0])
    if use_kernel(x):
        checks.kernel_inputs(op, weight.shape[0], x=x, residual=residual)
        out, pre = launcher.forward(x, weight, bias, residual, activation, save_pre)
    else:
        shaped = reference.linear_act(x, weight, bias, "none")
        out = reference.ACTIVATIONS[activation](shaped)
        out = out if residual is None else residual + out
        pre = launcher.matrix(shaped)
    return out, pre if save_pre and pre is not None else x.new_empty(0)


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    op = "linear_backward"
    checks.activation(op, activation)
    checks.tensors(op, dout=dout, x=x, weight=weight)
    checks.layer(op, x, x.shape[-1], ("weight", ""), weight, None)
    _checks.shape(op, "dout", dout, (*x.shape[:-1], weight.shape[0]))
    checks.kept(op, x, weight.shape[0], pre=pre)
    grads: tuple[torch.Tensor | None, ...]
    if use_kernel(x):
        checks.kernel_inputs(op, weight.shape[0], x=x)
        grads = launcher.backward(dout, x, weight, pre, activation, *needs)
    else:
        dout_rows = launcher.matrix_of_grad(dout, x.dtype)
        dx, dweight, dbias = reference.linear_backward(
            dout_rows, launcher.matrix(x), weight, dout_rows if pre is None else pre, activation
        )
        grads = dx.view(x.shape), torch.empty_like(weight).copy_(dweight), dbias
    return tuple(
        grad if wanted and grad is not None else x.new_empty(0)
        for grad, wanted in zip(grads, needs, strict=True)
    )


def _fake_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    features = weight.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    out = x.new_empty(*x.shape[:-1], features, dtype=dtype)
    return out, x.new_empty(math.prod(x.shape[:-1]), features) if save_pre else x.new_empty(0)


def _fake_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape) if needs[0] else x.new_empty(0),
        torch.empty_like(weight) if needs[1] else x.new_empty(0),
        x.new_empty(weight.shape[0]) if needs[2] else x.new_empty(0),
    )


for _device in ("CUDA", "CPU"):
    _library.impl("linear", _forward, _device)
    _library.impl("linear_backward", _backward, _device)
torch.library.register_fake("gptkern::linear", _fake_forward, lib=_library)
torch.library.register_fake("gptkern::linear_backward", _fake_backward, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, _, activation, save_pre = inputs
    ctx.save_for_backward(x, weight, output[1] if save_pre else None)
    ctx.activation = activation
    ctx.set_materialize_grads(False)  # no zeros the size of pre for its gradient, which nobody asks for


def _grads(ctx: Any, dout: torch.Tensor | None, dpre: torch.Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 6
    x, weight, pre = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads: tuple[torch.Tensor | None, ...] = (None, None, None)
    if any(needs):
        found = torch.ops.gptkern.linear_backward(dout, x, weight, pre, ctx.activation, needs)
        grads = tuple(grad if wanted else None for grad, wanted in zip(found, needs, strict=True))
    dresidual = dout if ctx.needs_input_grad[3] else None
    return *grads, dresidual, None, None


torch.library.register_autograd("gptkern::linear", _grads, setup_context=_setup_context, lib=_library)


class Linear(torch.autograd.Function):
    """The same gradient straight over the launches, without the dispatcher: the eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        activation: str,
    ) -> torch.Tensor:
        out, pre = launcher.forward(x, weight, bias, residual, activation, activation != "none")
        ctx.save_for_backward(x, weight, pre)
        ctx.activation = activation
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        x, weight, pre = ctx.saved_tensors
        grads = launcher.backward(dout, x, weight, pre, ctx.activation, *ctx.needs_input_grad[:3])
        return *grads, dout if ctx.needs_input_grad[3] else None, None
