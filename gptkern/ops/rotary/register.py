"""Rotary positions as PyTorch sees them: autograd function, registered ops, fake kernels."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._dispatch import INTERPRETED
from gptkern.ops._register import kernel_backward, register, tensor_or_empty
from gptkern.ops.rotary import checks, launch
from gptkern.ops.rotary.launch import Angles, HeadNorm

Maybe = torch.Tensor | None
# On a CPU the reference runs, which is differentiable itself: only kernels are registered.
_DEVICES = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)


class Rotary(torch.autograd.Function):
    """The kernels under eager autograd."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: Maybe, *rest: Any) -> Any:
        cos, sin, positions, pairs, q_weight, k_weight, eps, unit_offset = rest
        angles, norm = Angles(cos, sin, positions, pairs), HeadNorm(q_weight, k_weight, eps, unit_offset)
        _save(ctx, q, k, angles, norm)
        q_out, k_out = launch.turn(q, k, angles, norm)
        return q_out if k_out is None else (q_out, k_out)

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, dq: torch.Tensor, dk: Maybe = None) -> Any:
        q_grad, k_grad, q_weight_grad, k_weight_grad = launch.backward(dq, dk, *_saved(ctx))
        return q_grad, k_grad, None, None, None, None, q_weight_grad, k_weight_grad, None, None


def _save(ctx: Any, q: torch.Tensor, k: Maybe, angles: Angles, norm: HeadNorm) -> None:
    heads = (None, None) if norm.q_weight is None else (q, k)
    ctx.save_for_backward(*heads, *angles[:3], *norm[:2])
    ctx.settings = (angles.pairs, norm.eps, norm.unit_offset)


def _saved(ctx: Any) -> tuple[Maybe, Maybe, Angles, HeadNorm]:
    q, k, cos, sin, positions, q_weight, k_weight = ctx.saved_tensors
    pairs, eps, unit_offset = ctx.settings
    return q, k, Angles(cos, sin, positions, pairs), HeadNorm(q_weight, k_weight, eps, unit_offset)


def flat(angles: Angles, norm: HeadNorm) -> tuple[Any, ...]:
    """The settings of a call in the order of the schemas."""
    return *angles, *norm


def _forward(q: torch.Tensor, k: Maybe, *settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    angles, norm = Angles(*settings[:4]), HeadNorm(*settings[4:])
    checks.check("rotary", q, k, angles, norm)
    q_out, k_out = launch.turn(q, k, angles, norm)
    return q_out, tensor_or_empty(k_out, q)


def _fake(q: torch.Tensor, k: Maybe, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


def _backward(dq: torch.Tensor, dk: Maybe, q: Maybe, k: Maybe, *settings: Any) -> tuple[torch.Tensor, ...]:
    angles, norm = Angles(*settings[:4]), HeadNorm(*settings[4:])
    checks.check("rotary_backward", dq, dk, angles, norm)
    if (q is None) != (norm.q_weight is None):
        raise ValueError("rotary_backward: q is needed with a norm, and only then")
    if q is not None:
        checks.check("rotary_backward", q, k, angles, norm)
    grads = launch.backward(dq, dk, q, k, angles, norm)
    return tuple(tensor_or_empty(grad, dq) for grad in grads)


def _fake_backward(
    dq: torch.Tensor, dk: Maybe, q: Maybe, k: Maybe, *settings: Any
) -> tuple[torch.Tensor, ...]:
    values = (dq, dk, *settings[4:6])
    return tuple(dq.new_empty(0) if x is None else x.new_empty(x.shape) for x in values)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, *settings = inputs
    _save(ctx, q, k, Angles(*settings[:4]), HeadNorm(*settings[4:]))
    ctx.has_keys = k is not None


def _grads(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Any, ...]:
    q, k, angles, norm = _saved(ctx)
    grads = torch.ops.gptkern.rotary_backward(dq, dk if ctx.has_keys else None, q, k, *flat(angles, norm))
    wanted = (True, ctx.has_keys, norm.q_weight is not None, norm.k_weight is not None)
    q_grad, k_grad, q_weight_grad, k_weight_grad = (
        grad if want else None for grad, want in zip(grads, wanted, strict=True)
    )
    return q_grad, k_grad, None, None, None, None, q_weight_grad, k_weight_grad, None, None


_SETTINGS = (
    "Tensor cos, Tensor sin, Tensor? positions, str pairs, Tensor? q_weight, Tensor? k_weight, float eps, "
    "bool unit_offset"
)
register(
    f"rotary_backward(Tensor dq, Tensor? dk, Tensor? q, Tensor? k, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
    devices=_DEVICES,
)
register(
    f"rotary(Tensor q, Tensor? k, {_SETTINGS}) -> (Tensor, Tensor)",
    _forward,
    fake=_fake,
    setup_context=_setup,
    backward=_grads,
    devices=_DEVICES,
)
