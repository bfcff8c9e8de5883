"""Launches of rotary positions: layouts, outputs, grids."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from gptkern.ops import _checks, _launch
from gptkern.ops._triton import triton
from gptkern.ops.linear.launch import column_sum
from gptkern.ops.rotary import kernels

Maybe = torch.Tensor | None
Layout = tuple[int, int, int, int]


class Angles(NamedTuple):
    """The tables ``(context, dim / 2)``, the tokens' positions or None, and how elements pair up."""

    cos: torch.Tensor
    sin: torch.Tensor
    positions: Maybe
    pairs: str


class HeadNorm(NamedTuple):
    """The RMS norm of each head before it is turned; without weights there is none."""

    q_weight: Maybe
    k_weight: Maybe
    eps: float
    unit_offset: bool


def layout(name: str, x: torch.Tensor) -> Layout:
    """(inner, stride_outer, stride_inner, stride_head) of a tensor's tokens, at most two strided loops."""
    return *_checks.strided_loops("rotary", name, x, 2, "dimensions before the heads"), x.stride(-2)


def _layouts(**values: Maybe) -> list[int]:
    return [
        number for name, x in values.items() for number in ((1, 0, 0, 0) if x is None else layout(name, x))
    ]


def _sizes(kernel: str, q: torch.Tensor, k: Maybe, angles: Angles) -> tuple[dict[str, Any], int, int]:
    """(the kernel's constants, blocks of q's heads, blocks of k's)."""
    config = dict(_launch.config(kernel, q.device))
    heads, head_dim = q.shape[-2:]
    kv_heads, dim = 0 if k is None else k.shape[-2], 2 * angles.cos.shape[1]
    elements = config.pop("ELEMENTS")
    most = max(1, elements // triton.next_power_of_2(head_dim))
    block_h = min(triton.next_power_of_2(heads), most)
    # Small tiles by fewer threads: 8 elements of a half each, so that they load 16 bytes at once.
    tile = block_h * triton.next_power_of_2(head_dim)
    config["num_warps"] = min(config["num_warps"], max(1, tile // 512))
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "DIM": dim,
        "INTERLEAVED": angles.pairs == "interleaved",
        "BLOCK_H": block_h,
        "BLOCK_P": triton.next_power_of_2(dim // 2),
        "BLOCK_R": triton.next_power_of_2(max(1, head_dim - dim)),
        **config,
    }
    return constants, triton.cdiv(heads, block_h), triton.cdiv(kv_heads, block_h)


def _rows(q: torch.Tensor, positions: Maybe) -> int:
    """Tokens after which positions repeat."""
    return q.shape[-3] if positions is None else positions.numel()


def turn(
    q: torch.Tensor,
    k: Maybe,
    angles: Angles,
    norm: HeadNorm,
    *,
    in_place: bool = False,
    back: bool = False,
) -> tuple[torch.Tensor, Maybe]:
    """q and k turned; ``back`` by the angles with the other sign."""
    q_out = q if in_place else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = k if in_place or k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    constants, blocks, kv_blocks = _sizes("rotary", q, k, angles)
    tokens = math.prod(q.shape[:-2])
    with _launch.on_device(q):
        _launch.launch(
            kernels.rotary_kernel,
            (tokens, blocks + kv_blocks),
            *(q, k, q_out, k_out, *angles[:3], *norm[:2]),
            *(_rows(q, angles.positions), angles.cos.shape[0], norm.eps),
            *_layouts(q=q, k=k, q_out=q_out, k_out=k_out),
            UNIT_OFFSET=float(norm.unit_offset),
            BACK=back,
            **constants,
        )
    return q_out, k_out


def norm_backward(
    dq: torch.Tensor, dk: Maybe, q: torch.Tensor, k: Maybe, angles: Angles, norm: HeadNorm
) -> tuple[torch.Tensor, Maybe, Maybe, Maybe]:
    """The gradients of q, k and the norm's two weights."""
    q_grad = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_grad = None if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    constants, blocks, kv_blocks = _sizes("rotary_norm_backward", q, k, angles)
    tokens = math.prod(q.shape[:-2])
    programs = min(tokens, constants.pop("programs_per_sm") * _launch.multiprocessors(q.device))
    q_part, k_part = (
        torch.zeros((max(programs * count, 1), q.shape[-1]), dtype=torch.float32, device=q.device)
        for count in (blocks, kv_blocks)
    )
    with _launch.on_device(q):
        _launch.launch(
            kernels.rotary_norm_backward_kernel,
            (programs, blocks + kv_blocks),
            *(dq, dk, q, k, q_grad, k_grad, *norm[:2], q_part, k_part, *angles[:3]),
            *(tokens, _rows(q, angles.positions), angles.cos.shape[0], norm.eps),
            *_layouts(dq=dq, dk=dk, q=q, k=k),
            UNIT_OFFSET=float(norm.unit_offset),
            **constants,
        )
    assert norm.q_weight is not None
    q_weight_grad = column_sum(q_part, norm.q_weight.dtype)
    k_weight_grad = None if norm.k_weight is None else column_sum(k_part, norm.k_weight.dtype)
    return q_grad, k_grad, q_weight_grad, k_weight_grad


def backward(
    dq: torch.Tensor, dk: Maybe, q: Maybe, k: Maybe, angles: Angles, norm: HeadNorm
) -> tuple[torch.Tensor, Maybe, Maybe, Maybe]:
    """The gradients of q, k and the norm's weights; q and k are needed where there is a norm."""
    # Autograd chose the gradients' layout.
    dq, dk = dq.contiguous(), None if dk is None else dk.contiguous()
    if norm.q_weight is None:
        return *turn(dq, dk, angles, norm, back=True), None, None
    assert q is not None
    return norm_backward(dq, dk, q, k, angles, norm)
