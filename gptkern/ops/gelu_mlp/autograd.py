"""``gelu_mlp`` as PyTorch sees it: the registered operator, its fake kernels and its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import use_kernel
from gptkern.ops.gelu_mlp import launcher, reference
from gptkern.ops.linear import checks
from gptkern.ops.linear.launcher import matrix, matrix_of_grad

_library = torch.library.Library("gptkern", "FRAGMENT")
_library.define(
    "gelu_mlp(Tensor x, Tensor w_fc, Tensor? b_fc, Tensor w_proj, Tensor? b_proj, Tensor? residual,"
    " str activation, bool save) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "gelu_mlp_backward(Tensor dout, Tensor x, Tensor w_fc, Tensor? b_fc, Tensor w_proj, Tensor? pre,"
    " Tensor? hidden, str activation, bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _check_layers(
    op: str,
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    activation: str,
) -> None:
    checks.activation(op, activation)
    checks.layer(op, x, x.shape[-1], ("w_fc", "b_fc"), w_fc, b_fc)
    checks.layer(op, x, w_fc.shape[0], ("w_proj", "b_proj"), w_proj, b_proj)


def _forward(
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "gelu_mlp"
    checks.tensors(op, x=x, w_fc=w_fc, b_fc=b_fc, w_proj=w_proj, b_proj=b_proj, residual=residual)
    _check_layers(op, x, w_fc, b_fc, w_proj, b_proj, activation)
    if residual is not None:
        checks.residual(op, x, residual, w_proj.shape[0])
    if use_kernel(x):
        checks.kernel_inputs(op, max(w_fc.shape[0], w_proj.shape[0]), x=x, residual=residual)
    else:
        out = reference.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, activation, residual)
        kept = x.new_empty(math.prod(x.shape[:-1]) if save else 0, w_fc.shape[0])
        return out, kept, torch.empty_like(kept)  # never read: the reference's backward recomputes them
    out, pre, hidden = launcher.forward(x, w_fc, b_fc, w_proj, b_proj, residual, activation, save)
    if pre is None or hidden is None:
        return out, x.new_empty(0, w_fc.shape[0]), x.new_empty(0, w_fc.shape[0])
    return out, pre, hidden


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    pre: torch.Tensor | None,
    hidden: torch.Tensor | None,
    activation: str,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[torch.Tensor, ...]:
    op = "gelu_mlp_backward"
    checks.tensors(op, dout=dout, x=x, w_fc=w_fc, b_fc=b_fc, w_proj=w_proj)
    _check_layers(op, x, w_fc, b_fc, w_proj, None, activation)
    _checks.shape(op, "dout", dout, (*x.shape[:-1], w_proj.shape[0]))
    grads: tuple[torch.Tensor | None, ...]
    if use_kernel(x):
        checks.kept(op, x, w_fc.shape[0], pre=pre, hidden=hidden)
        checks.kernel_inputs(op, max(w_fc.shape[0], w_proj.shape[0]), x=x)
        grads = launcher.backward(dout, x, w_fc, b_fc, w_proj, pre, hidden, activation, needs)
    else:
        dx, dw_fc, db_fc, dw_proj, db_proj = reference.gelu_mlp_backward(
            matrix_of_grad(dout, x.dtype), matrix(x), w_fc, b_fc, w_proj, activation
        )
        dw_fc, dw_proj = torch.empty_like(w_fc).copy_(dw_fc), torch.empty_like(w_proj).copy_(dw_proj)
        grads = dx.view(x.shape), dw_fc, db_fc, dw_proj, db_proj
    return tuple(
        grad if wanted and grad is not None else x.new_empty(0)
        for grad, wanted in zip(grads, needs, strict=True)
    )


def _fake_forward(
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = x.dtype if residual is None else residual.dtype
    kept = math.prod(x.shape[:-1]) if save else 0
    return (
        x.new_empty(*x.shape[:-1], w_proj.shape[0], dtype=dtype),
        x.new_empty(kept, w_fc.shape[0]),
        x.new_empty(kept, w_fc.shape[0]),
    )


def _fake_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    pre: torch.Tensor | None,
    hidden: torch.Tensor | None,
    activation: str,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[torch.Tensor, ...]:
    grads = (
        x.new_empty(x.shape),
        torch.empty_like(w_fc),
        x.new_empty(w_fc.shape[0]),
        torch.empty_like(w_proj),
        x.new_empty(w_proj.shape[0]),
    )
    return tuple(grad if wanted else x.new_empty(0) for grad, wanted in zip(grads, needs, strict=True))


for _device in ("CUDA", "CPU"):
    _library.impl("gelu_mlp", _forward, _device)
    _library.impl("gelu_mlp_backward", _backward, _device)
torch.library.register_fake("gptkern::gelu_mlp", _fake_forward, lib=_library)
torch.library.register_fake("gptkern::gelu_mlp_backward", _fake_backward, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, w_fc, b_fc, w_proj, _, _, activation, save = inputs
    pre, hidden = output[1:] if save else (None, None)
    ctx.save_for_backward(x, w_fc, b_fc, w_proj, pre, hidden)
    ctx.activation = activation
    ctx.set_materialize_grads(False)  # no zeros for the gradients of pre and hidden, which nobody asks for


def _grads(ctx: Any, dout: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 8
    needs = ctx.needs_input_grad[:5]
    grads: tuple[torch.Tensor | None, ...] = (None,) * 5
    if any(needs):
        found = torch.ops.gptkern.gelu_mlp_backward(dout, *ctx.saved_tensors, ctx.activation, needs)
        grads = tuple(grad if wanted else None for grad, wanted in zip(found, needs, strict=True))
    return *grads, dout if ctx.needs_input_grad[5] else None, None, None


torch.library.register_autograd("gptkern::gelu_mlp", _grads, setup_context=_setup_context, lib=_library)


class GeluMLP(torch.autograd.Function):
    """The same gradient straight over the launches, without the dispatcher: the eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w_fc: torch.Tensor,
        b_fc: torch.Tensor | None,
        w_proj: torch.Tensor,
        b_proj: torch.Tensor | None,
        residual: torch.Tensor | None,
        activation: str,
        save: bool,
    ) -> torch.Tensor:
        out, pre, hidden = launcher.forward(x, w_fc, b_fc, w_proj, b_proj, residual, activation, save)
        ctx.save_for_backward(x, w_fc, b_fc, w_proj, pre, hidden)
        ctx.activation = activation
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        x, w_fc, b_fc, w_proj, pre, hidden = ctx.saved_tensors
        grads = launcher.backward(dout, x, w_fc, b_fc, w_proj, pre, hidden, ctx.activation, needs[:5])
        return *grads, dout if needs[5] else None, None, None
