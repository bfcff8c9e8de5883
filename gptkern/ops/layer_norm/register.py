"""The norms as PyTorch sees them: autograd function, registered ops, fake kernels. RMS norm shares them."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import INTERPRETED
from gptkern.ops._register import kernel_backward, register, tensor_or_empty
from gptkern.ops.layer_norm import launch
from gptkern.ops.layer_norm.checks import check, check_kernel
from gptkern.ops.layer_norm.launch import Forward, Saved, Settings, forward_plan

Maybe = torch.Tensor | None
# The references take CPU tensors and are differentiable themselves: only kernels are registered.
_DEVICES = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)


class Norm(torch.autograd.Function):
    """The kernels under eager autograd, without the dispatcher's cost for registered ops."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: Maybe,
        weight: Maybe,
        bias: Maybe,
        seed: Maybe,
        plan: Forward,
    ) -> Any:
        out, total, stats = launch.forward(plan, x, residual, weight, bias, seed, True)
        _save(ctx, x, residual, weight, bias, total, stats, seed, plan.settings)
        return out if total is None else (out, total)

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, d_out: Maybe, d_total: Maybe = None) -> Any:
        saved = Saved(*ctx.saved_tensors, *ctx.settings)
        weight_grads = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        d_out = torch.zeros_like(saved.total) if d_out is None else d_out
        dx, d_residual, d_weight, d_bias = launch.backward(d_out, d_total, saved, weight_grads)
        if d_residual is None and ctx.needs_input_grad[1]:
            d_residual = dx
        return dx, d_residual, d_weight, d_bias, None, None


def _save(
    ctx: Any,
    x: torch.Tensor,
    residual: Maybe,
    weight: Maybe,
    bias: Maybe,
    total: Maybe,
    stats: torch.Tensor,
    seed: Maybe,
    settings: Settings,
) -> None:
    """Save a forward pass for ``Saved(*ctx.saved_tensors, *ctx.settings)``."""
    ctx.save_for_backward(x if total is None else total, weight, stats, seed)
    residual_dtype = x.dtype if residual is None else residual.dtype
    kind = (settings.dropout_p, settings.centered, settings.unit_offset)
    ctx.settings = (*kind, x.dtype, residual_dtype, None if bias is None else bias.dtype)
    ctx.set_materialize_grads(False)


_BACKWARD = (
    "norm_backward(Tensor d_out, Tensor? d_total, Tensor total, Tensor? weight, Tensor stats, Tensor? seed, "
    "float dropout_p, bool centered, bool unit_offset, ScalarType x_dtype, ScalarType residual_dtype, "
    "ScalarType? bias_dtype, bool weight_grads) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _check_seed(op: str, x: torch.Tensor, dropout_p: float, seed: Maybe) -> None:
    if seed is not None or dropout_p > 0.0:
        _checks.tensor(op, "seed", seed)
        assert seed is not None
        _checks.shape(op, "seed", seed, (1,))
        _checks.dtype(op, "seed", seed, (torch.int64,))
        _checks.same_device(op, x=x, seed=seed)


def _check_backward(d_out: torch.Tensor, d_total: Maybe, saved: Saved) -> None:
    op, total, stats = "norm_backward", saved.total, saved.stats
    check(op, total, None, saved.weight, None, eps=0.0)
    check_kernel(op, d_out=d_out, d_total=d_total, total=total, weight=saved.weight)
    for name, value in (("d_out", d_out), ("d_total", d_total)):
        if value is not None:
            _checks.shape(op, name, value, total.shape)
            _checks.dtype(op, name, value)
    _checks.shape(op, "stats", stats, (1 + saved.centered, total.numel() // total.shape[-1]))
    _checks.dtype(op, "stats", stats, (torch.float32,))
    if not stats.is_contiguous():
        raise ValueError(f"{op}: stats has strides {stats.stride()}; contiguous is needed")
    _check_seed(op, total, saved.dropout_p, saved.seed)
    _checks.same_device(op, total=total, d_out=d_out, d_total=d_total, stats=stats)


def _backward(d_out: torch.Tensor, d_total: Maybe, *rest: Any) -> Any:
    *values, weight_grads = rest
    saved = Saved(*values)
    _check_backward(d_out, d_total, saved)
    grads = launch.backward(d_out, d_total, saved, weight_grads)
    return tuple(tensor_or_empty(grad, saved.total) for grad in grads)


def _fake_backward(d_out: torch.Tensor, d_total: Maybe, *rest: Any) -> Any:
    *values, weight_grads = rest
    saved = Saved(*values)
    total, weight = saved.total, saved.weight
    separate, bias_dtype = saved.separate_residual_grad, saved.bias_dtype
    return (
        total.new_empty(total.shape, dtype=saved.x_dtype),
        total.new_empty(total.shape, dtype=saved.residual_dtype) if separate else total.new_empty(0),
        total.new_empty(0) if weight is None or not weight_grads else torch.empty_like(weight),
        total.new_empty(0)
        if weight is None or not weight_grads or bias_dtype is None
        else weight.new_empty(weight.shape, dtype=bias_dtype),
    )


def _grads(ctx: Any, d_out: Maybe, d_total: Maybe, weight_grads: bool) -> tuple[Maybe, ...]:
    """(dx, d_residual, d_weight, d_bias) through the registered backward op."""
    saved = Saved(*ctx.saved_tensors, *ctx.settings)
    d_out = torch.zeros_like(saved.total) if d_out is None else d_out
    dx, d_residual, d_weight, d_bias = torch.ops.gptkern.norm_backward(d_out, d_total, *saved, weight_grads)
    return (
        dx,
        d_residual if saved.separate_residual_grad else dx,
        d_weight if weight_grads and saved.weight is not None else None,
        d_bias if weight_grads and saved.bias_dtype is not None else None,
    )


def register_norm(name: str, *, centered: bool) -> None:
    """``name(x, weight, [bias,] eps, dtype[, unit_offset]) -> (normed, stats)``."""
    bias_argument, offset_argument = ("Tensor? bias, ", "") if centered else ("", ", bool unit_offset")
    schema = (
        f"{name}(Tensor x, Tensor? weight, {bias_argument}float eps, ScalarType dtype{offset_argument}) "
        "-> (Tensor, Tensor)"
    )

    def split(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(x, weight, bias, eps, dtype, unit_offset)."""
        return (*args, False) if centered else (*args[:2], None, *args[2:])

    def kernel(*args: Any) -> Any:
        x, weight, bias, eps, dtype, unit_offset = split(args)
        check(name, x, None, weight, bias, eps)
        check_kernel(name, x=x, weight=weight, bias=bias)
        plan = forward_plan(x, None, Settings(name, centered, eps, 0.0, dtype, unit_offset))
        out, _, stats = launch.forward(plan, x, None, weight, bias, None, True)
        return out, stats

    def fake(*args: Any) -> Any:
        x, _, _, _, dtype, _ = split(args)
        rows = x.numel() // x.shape[-1]
        return x.new_empty(x.shape, dtype=dtype), x.new_empty((1 + centered, rows), dtype=torch.float32)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, eps, dtype, unit_offset = split(inputs)
        settings = Settings(name, centered, eps, 0.0, dtype, unit_offset)
        _save(ctx, x, None, weight, bias, None, output[1], None, settings)

    def backward(ctx: Any, d_out: Maybe, _: Maybe) -> Any:
        needs = ctx.needs_input_grad[1:3] if centered else ctx.needs_input_grad[1:2]
        dx, _, d_weight, d_bias = _grads(ctx, d_out, None, any(needs))
        return (dx, d_weight, d_bias, None, None) if centered else (dx, d_weight, None, None, None)

    register(schema, kernel, fake=fake, setup_context=setup, backward=backward, devices=_DEVICES)


def register_add_norm(name: str, *, centered: bool) -> None:
    """``name(x, residual, weight, [bias,] eps, dropout_p, seed, dtype[, unit_offset])``.

    It returns (normed, new_residual, stats).
    """
    bias_argument, offset_argument = ("Tensor? bias, ", "") if centered else ("", ", bool unit_offset")
    schema = (
        f"{name}(Tensor x, Tensor residual, Tensor? weight, {bias_argument}float eps, float dropout_p, "
        f"Tensor? seed, ScalarType dtype{offset_argument}) -> (Tensor, Tensor, Tensor)"
    )

    def split(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(x, residual, weight, bias, eps, dropout_p, seed, dtype, unit_offset)."""
        return (*args, False) if centered else (*args[:3], None, *args[3:])

    def kernel(*args: Any) -> Any:
        x, residual, weight, bias, eps, dropout_p, seed, dtype, unit_offset = split(args)
        check(name, x, residual, weight, bias, eps, dropout_p)
        check_kernel(name, x=x, residual=residual, weight=weight, bias=bias)
        _check_seed(name, x, dropout_p, seed)
        plan = forward_plan(x, residual, Settings(name, centered, eps, dropout_p, dtype, unit_offset))
        return launch.forward(plan, x, residual, weight, bias, seed, True)

    def fake(*args: Any) -> Any:
        x, residual, *_, dtype, _ = split(args)
        rows = x.numel() // x.shape[-1]
        return (
            x.new_empty(x.shape, dtype=dtype),
            x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype)),
            x.new_empty((1 + centered, rows), dtype=torch.float32),
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, residual, weight, bias, eps, dropout_p, seed, dtype, unit_offset = split(inputs)
        settings = Settings(name, centered, eps, dropout_p, dtype, unit_offset)
        _save(ctx, x, residual, weight, bias, output[1], output[2], seed, settings)

    def backward(ctx: Any, d_out: Maybe, d_total: Maybe, _: Maybe) -> Any:
        needs = ctx.needs_input_grad[2:4] if centered else ctx.needs_input_grad[2:3]
        grads = _grads(ctx, d_out, d_total, any(needs))
        return (*(grads if centered else (*grads[:3], None)), None, None, None, None)

    register(schema, kernel, fake=fake, setup_context=setup, backward=backward, devices=_DEVICES)


register(_BACKWARD, _backward, fake=_fake_backward, devices=_DEVICES)
register_norm("layer_norm", centered=True)
register_add_norm("add_layer_norm", centered=True)
