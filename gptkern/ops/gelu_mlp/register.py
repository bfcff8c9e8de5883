"""The perceptrons as PyTorch sees them: autograd function, registered ops, their fake kernels and gradient.

``gated_mlp`` registers its own by ``register_mlp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import kernel_backward, register
from gptkern.ops.gelu_mlp import launch, reference
from gptkern.ops.gelu_mlp.launch import PLAIN, Form, Layers, Saved
from gptkern.ops.linear import checks
from gptkern.ops.linear.launch import matrix, matrix_of_grad
from gptkern.ops.linear.register import needed_grads, registered_grads

Maybe = torch.Tensor | None


def _saved(ctx: Any) -> Saved:
    x, w_fc, b_fc, w_proj, pre, hidden = ctx.saved_tensors
    return Saved(x, w_fc, b_fc, w_proj, pre, hidden, ctx.activation)


class MLP(torch.autograd.Function):
    """The launches under eager autograd, without the dispatcher's cost for registered ops.

    Its inputs are the form, ``x``, the four tensors of ``Layers``, the residual, the activation and whether
    to save the hidden layer.
    """

    @staticmethod
    def forward(ctx: Any, form: Form, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        *weights, residual, activation, save = rest
        layers = Layers(*weights)
        out, pre, hidden = launch.forward(form, x, layers, residual, activation, save)
        ctx.save_for_backward(x, layers.w_fc, layers.b_fc, layers.w_proj, pre, hidden if save else None)
        ctx.form, ctx.activation = form, activation
        return out

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[1:]
        grads = launch.backward(ctx.form, dout, _saved(ctx), needs[:5])
        return None, *grads, dout if needs[5] else None, None, None


def check_layers(op: str, gate: int, x: torch.Tensor, layers: Layers, activation: str) -> None:
    """Raise for an activation, weights or biases that do not fit each other or ``x``."""
    w_fc, b_fc, w_proj, b_proj = layers
    checks.activation(op, activation)
    checks.layer(op, x, x.shape[-1], ("w_fc", "b_fc"), w_fc, b_fc)
    if w_fc.shape[0] % gate:
        raise ValueError(
            f"{op}: w_fc has {w_fc.shape[0]} rows; an even number is needed: gate's, then as many of up's"
        )
    checks.layer(op, x, w_fc.shape[0] // gate, ("w_proj", "b_proj"), w_proj, b_proj)


def _forward(
    form: Form, plain: Callable[..., torch.Tensor], x: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *weights, residual, activation, save = rest
    op, layers = form.op, Layers(*weights)
    checks.tensors(op, x=x, **layers._asdict(), residual=residual)
    check_layers(op, form.gate, x, layers, activation)
    if residual is not None:
        checks.residual(op, x, residual, layers.w_proj.shape[0])
    width = layers.w_fc.shape[0]
    if not use_kernel(x):
        out = plain(x, *layers, activation, residual)
        rows = math.prod(x.shape[:-1]) if save else 0
        # The reference's backward recomputes both: nobody reads them.
        return out, x.new_empty(rows, width), x.new_empty(rows, width // form.gate)
    checks.kernel_inputs(op, max(width, layers.w_proj.shape[0]), x=x, residual=residual)
    out, pre, hidden = launch.forward(form, x, layers, residual, activation, save)
    if pre is None:
        return out, x.new_empty(0, width), x.new_empty(0, width // form.gate)
    return out, pre, hidden


def _fake_forward(form: Form, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *weights, residual, _, save = rest
    layers = Layers(*weights)
    rows, width = math.prod(x.shape[:-1]) if save else 0, layers.w_fc.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    out = x.new_empty(*x.shape[:-1], layers.w_proj.shape[0], dtype=dtype)
    return out, x.new_empty(rows, width), x.new_empty(rows, width // form.gate)


def _backward(
    form: Form, plain: Callable[..., tuple[torch.Tensor, ...]], dout: torch.Tensor, *saved_and_needs: Any
) -> tuple[torch.Tensor, ...]:
    *values, needs = saved_and_needs
    saved = Saved(*values)
    op, (x, w_fc, b_fc, w_proj, pre, hidden, activation) = f"{form.op}_backward", saved
    checks.tensors(op, dout=dout, x=x, w_fc=w_fc, b_fc=b_fc, w_proj=w_proj)
    check_layers(op, form.gate, x, Layers(w_fc, b_fc, w_proj, None), activation)
    _checks.shape(op, "dout", dout, (*x.shape[:-1], w_proj.shape[0]))
    grads: tuple[Maybe, ...]
    if use_kernel(x):
        checks.saved(op, x, w_fc.shape[0], pre=pre)
        checks.saved(op, x, w_fc.shape[0] // form.gate, hidden=hidden)
        checks.kernel_inputs(op, max(w_fc.shape[0], w_proj.shape[0]), x=x)
        grads = launch.backward(form, dout, saved, needs)
    else:
        dx, dw_fc, db_fc, dw_proj, db_proj = plain(
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


def register_mlp(
    form: Form, plain: Callable[..., torch.Tensor], plain_backward: Callable[..., tuple[torch.Tensor, ...]]
) -> None:
    """Register ``form.op`` and ``form.op + "_backward"``; the plain functions are their references."""

    def forward(*args: Any) -> tuple[torch.Tensor, ...]:
        return _forward(form, plain, *args)

    def fake(*args: Any) -> tuple[torch.Tensor, ...]:
        return _fake_forward(form, *args)

    def backward(*args: Any) -> tuple[torch.Tensor, ...]:
        return _backward(form, plain_backward, *args)

    def grads(ctx: Any, dout: Maybe, *_: Maybe) -> tuple[Any, ...]:
        op = getattr(torch.ops.gptkern, f"{form.op}_backward")
        return registered_grads(op, _saved, ctx.needs_input_grad[:5], ctx, dout)

    register(
        f"{form.op}(Tensor x, Tensor w_fc, Tensor? b_fc, Tensor w_proj, Tensor? b_proj, Tensor? residual,"
        " str activation, bool save) -> (Tensor, Tensor, Tensor)",
        forward,
        fake=fake,
        setup_context=_setup_context,
        backward=grads,
    )
    register(
        f"{form.op}_backward(Tensor dout, Tensor x, Tensor w_fc, Tensor? b_fc, Tensor w_proj, Tensor? pre,"
        " Tensor? hidden, str activation, bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        backward,
        fake=_fake_backward,
    )


register_mlp(PLAIN, reference.gelu_mlp, reference.gelu_mlp_backward)
