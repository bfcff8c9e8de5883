"""How PyTorch sees the norms: autograd function, registered ops, their fake kernels. RMS norm included."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import INTERPRETED, autocast_dtype
from gptkern.ops.layer_norm import launcher
from gptkern.ops.layer_norm.checks import check, check_kernel

Maybe = torch.Tensor | None


def out_dtype(x: torch.Tensor, residual: Maybe) -> torch.dtype:
    """The dtype of the normalised rows: autocast's, else that of what is normalised."""
    cast = autocast_dtype(x)
    if cast is not None and x.dtype is not torch.float64:
        return cast
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def new_seed(x: torch.Tensor, dropout_p: float) -> Maybe:
    """A seed on ``x``'s device: drawn without synchronisation, and anew at each replay of a CUDA graph."""
    return torch.randint(2**62, (1,), device=x.device) if dropout_p > 0.0 else None


class Norm(torch.autograd.Function):
    """The kernels straight under eager autograd, without the dispatcher's cost for registered ops."""

    @staticmethod
    def forward(
        ctx: Any, op: str, x: torch.Tensor, residual: Maybe, weight: torch.Tensor, bias: Maybe, eps: float,
        dropout_p: float, seed: Maybe, centered: bool, dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        out, total, stats = launcher.forward(
            op, x, residual, weight, bias, eps, dropout_p, seed, centered, dtype, True
        )
        ctx.save_for_backward(x if total is None else total, weight, stats, seed)
        ctx.settings = (
            dropout_p,
            centered,
            x.dtype,
            x.dtype if residual is None else residual.dtype,
            None if bias is None else bias.dtype,
        )
        ctx.set_materialize_grads(False)
        return out if total is None else (out, total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Maybe, d_total: Maybe = None) -> Any:
        total, weight, stats, seed = ctx.saved_tensors
        dropout_p, centered, x_dtype, residual_dtype, bias_dtype = ctx.settings
        weight_grads = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        dx, d_residual, d_weight, d_bias = launcher.backward(
            torch.zeros_like(total) if d_out is None else d_out,
            d_total, total, weight, stats, dropout_p, seed, centered, x_dtype, residual_dtype, weight_grads,
            bias_dtype,
        )  # fmt: skip
        if d_residual is None and ctx.needs_input_grad[2]:
            d_residual = dx
        return None, dx, d_residual, d_weight, d_bias, None, None, None, None, None


_LIBRARY = torch.library.Library("gptkern", "FRAGMENT")
_DEVICES = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
_BACKWARD = (
    "norm_backward(Tensor d_out, Tensor? d_total, Tensor total, Tensor weight, Tensor stats, "
    "float dropout_p, Tensor? seed, bool centered, ScalarType x_dtype, ScalarType residual_dtype, "
    "bool weight_grads, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _given(value: Maybe, like: torch.Tensor) -> torch.Tensor:
    """A registered op returns tensors: an empty one stands for None."""
    return like.new_empty(0) if value is None else value


def _check_seed(op: str, x: torch.Tensor, dropout_p: float, seed: Maybe) -> None:
    if seed is not None or dropout_p > 0.0:
        _checks.tensor(op, "seed", seed)
        assert seed is not None
        _checks.shape(op, "seed", seed, (1,))
        _checks.dtype(op, "seed", seed, (torch.int64,))
        _checks.same_device(op, x=x, seed=seed)


def _check_backward(
    d_out: torch.Tensor, d_total: Maybe, total: torch.Tensor, weight: torch.Tensor, stats: torch.Tensor,
    dropout_p: float, seed: Maybe, centered: bool, *_: Any,
) -> None:  # fmt: skip
    op = "norm_backward"
    check(op, total, None, weight, None)
    check_kernel(op, d_out=d_out, d_total=d_total, total=total, weight=weight)
    for name, value in (("d_out", d_out), ("d_total", d_total)):
        if value is not None:
            _checks.shape(op, name, value, total.shape)
            _checks.dtype(op, name, value)
    _checks.shape(op, "stats", stats, (1 + centered, total.numel() // total.shape[-1]))
    _checks.dtype(op, "stats", stats, (torch.float32,))
    if not stats.is_contiguous():
        raise ValueError(f"{op}: stats has strides {stats.stride()}; contiguous is needed")
    _checks.probability(op, "dropout_p", dropout_p)
    _check_seed(op, total, dropout_p, seed)
    _checks.same_device(op, total=total, d_out=d_out, d_total=d_total, stats=stats)


def _norm_backward(d_out: torch.Tensor, d_total: Maybe, total: torch.Tensor, *rest: Any) -> Any:
    _check_backward(d_out, d_total, total, *rest)
    return tuple(_given(grad, total) for grad in launcher.backward(d_out, d_total, total, *rest))


def _norm_backward_fake(
    d_out: torch.Tensor, d_total: Maybe, total: torch.Tensor, weight: torch.Tensor, stats: torch.Tensor,
    dropout_p: float, seed: Maybe, centered: bool, x_dtype: torch.dtype, residual_dtype: torch.dtype,
    weight_grads: bool, bias_dtype: torch.dtype | None,
) -> Any:  # fmt: skip
    separate = seed is not None or x_dtype != residual_dtype
    return (
        total.new_empty(total.shape, dtype=x_dtype),
        total.new_empty(total.shape if separate else (0,), dtype=residual_dtype if separate else total.dtype),
        torch.empty_like(weight) if weight_grads else total.new_empty(0),
        weight.new_empty(weight.shape, dtype=bias_dtype)
        if weight_grads and bias_dtype
        else total.new_empty(0),
    )


def _grads(ctx: Any, d_out: Maybe, d_total: Maybe, needs: tuple[bool, ...]) -> tuple[Maybe, ...]:
    """(dx, d_residual, d_weight, d_bias) through the registered backward op."""
    total, weight, stats, seed = ctx.saved_tensors
    dropout_p, centered, x_dtype, residual_dtype, bias_dtype = ctx.settings
    weight_grads = any(needs)
    d_out = torch.zeros_like(total) if d_out is None else d_out
    dx, d_residual, d_weight, d_bias = torch.ops.gptkern.norm_backward(
        d_out, d_total, total, weight, stats, dropout_p, seed, centered, x_dtype, residual_dtype,
        weight_grads, bias_dtype,
    )  # fmt: skip
    separate = seed is not None or x_dtype != residual_dtype
    return (
        dx,
        d_residual if separate else dx,
        d_weight if weight_grads else None,
        d_bias if weight_grads and bias_dtype is not None else None,
    )


def _register_norm(name: str, *, centered: bool) -> None:
    """``name(x, weight, [bias,] eps, dtype) -> (normed, stats)``."""
    bias_argument = "Tensor? bias, " if centered else ""
    _LIBRARY.define(
        f"{name}(Tensor x, Tensor weight, {bias_argument}float eps, ScalarType dtype) -> (Tensor, Tensor)"
    )

    def split(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if centered else (*args[:2], None, *args[2:])

    def run(*args: Any) -> Any:
        x, weight, bias, eps, dtype = split(args)
        check(name, x, None, weight, bias)
        check_kernel(name, x=x, weight=weight, bias=bias)
        out, _, stats = launcher.forward(name, x, None, weight, bias, eps, 0.0, None, centered, dtype, True)
        return out, stats

    def fake(*args: Any) -> Any:
        x, _, _, _, dtype = split(args)
        rows = x.numel() // x.shape[-1]
        return x.new_empty(x.shape, dtype=dtype), x.new_empty((1 + centered, rows), dtype=torch.float32)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, _, _ = split(inputs)
        ctx.save_for_backward(x, weight, output[1], None)
        ctx.settings = (0.0, centered, x.dtype, x.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, d_out: Maybe, _: Maybe) -> Any:
        needs = ctx.needs_input_grad[1:3] if centered else ctx.needs_input_grad[1:2]
        dx, _, d_weight, d_bias = _grads(ctx, d_out, None, needs)
        return (dx, d_weight, d_bias, None, None) if centered else (dx, d_weight, None, None)

    _register(name, run, fake, setup, backward)


def _register_add_norm(name: str, *, centered: bool) -> None:
    """``name(x, residual, weight, [bias,] eps, dropout_p, seed, dtype) -> (normed, new_residual, stats)``."""
    bias_argument = "Tensor? bias, " if centered else ""
    _LIBRARY.define(
        f"{name}(Tensor x, Tensor residual, Tensor weight, {bias_argument}float eps, float dropout_p, "
        "Tensor? seed, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
    )

    def split(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if centered else (*args[:3], None, *args[3:])

    def run(*args: Any) -> Any:
        x, residual, weight, bias, eps, dropout_p, seed, dtype = split(args)
        check(name, x, residual, weight, bias, dropout_p)
        check_kernel(name, x=x, residual=residual, weight=weight, bias=bias)
        _check_seed(name, x, dropout_p, seed)
        return launcher.forward(name, x, residual, weight, bias, eps, dropout_p, seed, centered, dtype, True)

    def fake(*args: Any) -> Any:
        x, residual, *_, dtype = split(args)
        rows = x.numel() // x.shape[-1]
        return (
            x.new_empty(x.shape, dtype=dtype),
            x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype)),
            x.new_empty((1 + centered, rows), dtype=torch.float32),
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, residual, weight, bias, _, dropout_p, seed, _ = split(inputs)
        ctx.save_for_backward(output[1], weight, output[2], seed)
        ctx.settings = (dropout_p, centered, x.dtype, residual.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, d_out: Maybe, d_total: Maybe, _: Maybe) -> Any:
        needs = ctx.needs_input_grad[2:4] if centered else ctx.needs_input_grad[2:3]
        grads = _grads(ctx, d_out, d_total, needs)
        return (*(grads if centered else grads[:3]), None, None, None, None)

    _register(name, run, fake, setup, backward)


def _register(name: str, run: Any, fake: Any, setup: Any, backward: Any) -> None:
    for device in _DEVICES:
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"gptkern::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"gptkern::{name}", backward, setup_context=setup, lib=_LIBRARY)


_LIBRARY.define(_BACKWARD)
_register("norm_backward", _norm_backward, _norm_backward_fake, None, None)
_register_norm("layer_norm", centered=True)
_register_norm("rms_norm", centered=False)
_register_add_norm("add_layer_norm", centered=True)
_register_add_norm("add_rms_norm", centered=False)
