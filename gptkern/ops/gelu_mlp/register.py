"""``gelu_mlp`` as PyTorch sees it: autograd function, registered ops, their fake kernels and gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import register
from gptkern.ops.gelu_mlp import launch, reference
from gptkern.ops.gelu_mlp.launch import Layers, Saved
from gptkern.ops.linear import checks
from gptkern.ops.linear.launch import matrix, matrix_of_grad
from gptkern.ops.linear.register import needed_grads, registered_grads

Maybe = torch.Tensor | None


def _saved(ctx: Any) -> Saved:
    x, w_fc, b_fc, w_proj, pre, hidden = ctx.saved_tensors
    return Saved(x, w_fc, b_fc, w_proj, pre, hidden, ctx.activation)


class GeluMLP(torch.autograd.Function):
    """The launches under eager autograd, without the dispatcher's cost for registered ops.

    Its inputs are ``x``, the four tensors of ``Layers``, the residual, the activation and whether to save
    the hidden layer.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        *weights, residual, activation, save = rest
        layers = Layers(*weights)
        out, pre, hidden = launch.forward(x, layers, residual, activation, save)
        ctx.save_for_backward(x, layers.w_fc, layers.b_fc, layers.w_proj, pre, hidden)
        ctx.activation = activation
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        grads = launch.backward(dout, _saved(ctx), needs[:5])
        return *grads, dout if needs[5] else None, None, None


def _check_layers(op: str, x: torch.Tensor, layers: Layers, activation: str) -> None:
    w_fc, b_fc, w_proj, b_proj = layers
    checks.activation(op, activation)
    checks.layer(op, x, x.shape[-1], ("w_fc", "b_fc"), w_fc, b_fc)
    checks.layer(op, x, w_fc.shape[0], ("w_proj", "b_proj"), w_proj, b_proj)


def _forward(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *weights, residual, activation, save = rest
    op, layers = "gelu_mlp", Layers(*weights)
    checks.tensors(op, x=x, **layers._asdict(), residual=residual)
    _check_layers(op, x, layers, activation)
    if residual is not None:
        checks.residual(op, x, residual, layers.w_proj.shape[0])
    inner = layers.w_fc.shape[0]
    if not use_kernel(x):
        out = reference.gelu_mlp(x, *layers, activation, residual)
        unread = x.new_empty(math.prod(x.shape[:-1]) if save else 0, inner)
        return out, unread, torch.empty_like(unread)  # the reference's backward recomputes both
    checks.kernel_inputs(op, max(inner, layers.w_proj.shape[0]), x=x, residual=residual)
    out, pre, hidden = launch.forward(x, layers, residual, activation, save)
    if pre is None or hidden is None:
        return out, x.new_empty(0, inner), x.new_empty(0, inner)
    return out, pre, hidden


def _fake_forward(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *weights, residual, _, save = rest
    layers = Layers(*weights)
    rows, inner = math.prod(x.shape[:-1]) if save else 0, layers.w_fc.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    out = x.new_empty(*x.shape[:-1], layers.w_proj.shape[0], dtype=dtype)
    return out, x.new_empty(rows, inner), x.new_empty(rows, inner)


def _backward(dout: torch.Tensor, *saved_and_needs: Any) -> tuple[torch.Tensor, ...]:
    *values, needs = saved_and_needs
    saved = Saved(*values)
    op, (x, w_fc, b_fc, w_proj, pre, hidden, activation) = "gelu_mlp_backward", saved
    checks.tensors(op, dout=dout, x=x, w_fc=w_fc, b_fc=b_fc, w_proj=w_proj)
    _check_layers(op, x, Layers(w_fc, b_fc, w_proj, None), activation)
    _checks.shape(op, "dout", dout, (*x.shape[:-1], w_proj.shape[0]))
    grads: tuple[Maybe, ...]
    if use_kernel(x):
        checks.saved(op, x, w_fc.shape[0], pre=pre, hidden=hidden)
        checks.kernel_inputs(op, max(w_fc.shape[0], w_proj.shape[0]), x=x)
        grads = launch.backward(dout, saved, needs)
    else:
        dx, dw_fc, db_fc, dw_proj, db_proj = reference.gelu_mlp_backward(
            matrix_of_grad(dout, x.dtype), matrix(x), w_fc, b_fc, w_proj, activation
        )
        dw_fc, dw_proj = torch.empty_like(w_fc).copy_(dw_fc), torch.empty_like(w_proj).copy_(dw_proj)
        grads = dx.view(x.shape), dw_fc, db_fc, dw_proj, db_proj
    return needed_grads(grads, needs, x)


def _fake_backward(dout: torch.Tensor, *saved_and_needs: Any) -> tuple[torch.Tensor, ...]:
    *values, needs = saved_and_needs
    x, w_fc, _, w_proj, *_ = Saved(*values)
    grads = (
        x.new_empty(x.shape),
        torch.empty_like(w_fc),
        x.new_empty(w_fc.shape[0]),
        torch.empty_like(w_proj),
        x.new_empty(w_proj.shape[0]),
    )
    return needed_grads(grads, needs, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, w_fc, b_fc, w_proj, _, _, activation, save = inputs
    ctx.save_for_backward(x, w_fc, b_fc, w_proj, *(output[1:] if save else (None, None)))
    ctx.activation = activation
    ctx.set_materialize_grads(False)  # no zeros for the gradients of pre and hidden, which nobody needs


def _grads(ctx: Any, dout: Maybe, *_: Maybe) -> tuple[Any, ...]:
    backward = torch.ops.gptkern.gelu_mlp_backward
    return registered_grads(backward, _saved, ctx.needs_input_grad[:5], ctx, dout)


register(
    "gelu_mlp(Tensor x, Tensor w_fc, Tensor? b_fc, Tensor w_proj, Tensor? b_proj, Tensor? residual,"
    " str activation, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_grads,
)
register(
    "gelu_mlp_backward(Tensor dout, Tensor x, Tensor w_fc, Tensor? b_fc, Tensor w_proj, Tensor? pre,"
    " Tensor? hidden, str activation, bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
)
