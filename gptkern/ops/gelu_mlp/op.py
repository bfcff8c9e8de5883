"""The GELU-MLP: two linear layers, the first with its activation, the second with its residual, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gptkern.ops._dispatch import autocast_dtype, call_key, needs_grad, traced, use_kernel
from gptkern.ops._launch import CHECKED, Plans, on_device, repeated
from gptkern.ops.gelu_mlp import launch, reference
from gptkern.ops.gelu_mlp.launch import PLAIN, Form, Layers
from gptkern.ops.gelu_mlp.register import MLP, check_layers
from gptkern.ops.linear import checks
from gptkern.ops.linear.op import cast

_plans: Plans[Any] = Plans()


def gelu_mlp(
    x: torch.Tensor,
    w_fc: torch.Tensor,
    b_fc: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    *,
    activation: str = "gelu_tanh",
    residual: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """``residual + activation(x @ w_fc.T + b_fc) @ w_proj.T + b_proj`` (Vaswani et al. 2017, equation 2).

    Two products: bias and activation in the epilogue of the first, bias and residual in that of the
    second. In the backward pass the activation's gradient is in the epilogue of a product too. All
    accumulate in fp32; a row's result does not depend on the other rows.

    Args:
        x: ``(..., in)``, fp32, fp16 or bf16 (float64 on a CPU). Any strides whose leading
            dimensions merge into one.
        w_fc: ``(hidden, in)``, any strides: weights stored ``(in, hidden)``, as in GPT-2's
            checkpoints, are passed as ``w_fc.t()``, without a copy. Of ``x``'s dtype, as all but
            the residual.
        b_fc: ``(hidden,)`` or None.
        w_proj: ``(out, hidden)``, any strides.
        b_proj: ``(out,)`` or None.
        activation: ``"gelu_tanh"``, ``"gelu"`` (by erf), ``"relu"``, ``"silu"`` or ``"none"``.
        residual: ``(..., out)`` or None, any strides whose leading dimensions merge into one; of
            ``x``'s dtype, or fp32 beside fp16 and bf16.
        recompute: Save only the arguments for the backward pass, and compute the hidden layer again
            there: one product more, and ``2 * tokens * hidden`` values less in memory. On a CPU,
            where the reference runs, PyTorch saves them either way.

    Returns:
        ``(..., out)``, contiguous, of ``residual``'s dtype, else ``x``'s; under autocast everything
        but the residual is cast to its dtype.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, layout, device or activation that is not accepted.
    """
    layers = Layers(w_fc, b_fc, w_proj, b_proj)
    return mlp(PLAIN, reference.gelu_mlp, x, layers, activation, residual, recompute)


def mlp(
    form: Form,
    plain: Callable[..., torch.Tensor],
    x: torch.Tensor,
    layers: Layers,
    activation: str,
    residual: torch.Tensor | None,
    recompute: bool,
) -> torch.Tensor:
    """A perceptron of any form; ``plain`` is its reference."""
    op = form.op
    key = call_key((x, *layers, residual), op, activation)
    if _plans.get(key) is None:
        checks.activation(op, activation)
        checks.tensors(op, x=x, **layers._asdict(), residual=residual)
        dtype = autocast_dtype(x)
        w_fc, b_fc, w_proj, b_proj = layers
        layers = Layers(cast(w_fc, dtype), cast(b_fc, dtype), cast(w_proj, dtype), cast(b_proj, dtype))
        x = cast(x, dtype)
        check_layers(op, form.gate, x, layers, activation)
        if residual is not None:
            checks.residual(op, x, residual, layers.w_proj.shape[0])
        if not use_kernel(x):
            return plain(x, *layers, activation, residual)
        outputs = max(layers.w_fc.shape[0], layers.w_proj.shape[0])
        checks.kernel_inputs(op, outputs, x=x, residual=residual)
        if traced(x):
            save = needs_grad(x, *layers, residual) and not recompute
            registered = getattr(torch.ops.gptkern, op)
            out: torch.Tensor = registered(x, *layers, residual, activation, save)[0]
            return out
        _plans.keep(key, CHECKED)
    if needs_grad(x, *layers, residual):
        out = MLP.apply(form, x, *layers, residual, activation, not recompute)
        return out
    with on_device(x):
        new = repeated(
            _plans,
            key,
            (x, *layers, residual),
            lambda: launch.forward(form, x, layers, residual, activation, False),
        )
    out = new[0]
    return out
