"""Argument errors of rotary positions."""

from __future__ import annotations

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import traced, use_kernel
from gptkern.ops.rotary.launch import Angles, HeadNorm

MAX_HEAD_DIM = 256
PAIRS = ("halves", "interleaved")


def check(op: str, q: torch.Tensor, k: torch.Tensor | None, angles: Angles, norm: HeadNorm) -> None:
    """Raise for arguments that ``rotary`` does not accept."""
    _checks.tensor(op, "q", q)
    floats = _checks.KERNEL_FLOATS if use_kernel(q) else _checks.FLOATS
    _checks.dtype(op, "q", q, floats)
    if q.dim() < 3 or not q.shape[-2] or not 2 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: q has shape {tuple(q.shape)}; (..., seq, heads, head_dim) with at least one head of 2 to "
            f"{MAX_HEAD_DIM} elements is needed"
        )
    if k is not None:
        _checks.tensor(op, "k", k)
        if k.dtype != q.dtype:
            raise TypeError(f"{op}: k is {k.dtype}, q {q.dtype}: one dtype is needed")
        if k.dim() != q.dim() or not k.shape[-2]:
            raise ValueError(
                f"{op}: k has shape {tuple(k.shape)}; that of q up to the number of heads is needed"
            )
        _checks.shape(op, "k", k, (*q.shape[:-2], k.shape[-2], q.shape[-1]), "q's but for the heads")
    _check_angles(op, q, angles)
    _check_norm(op, q, k, norm)
    _checks.same_device(op, q=q, k=k, cos=angles.cos, sin=angles.sin, positions=angles.positions)


def _check_angles(op: str, q: torch.Tensor, angles: Angles) -> None:
    cos, sin, positions, pairs = angles
    _checks.choice(op, "pairs", pairs, PAIRS)
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.tensor(op, name, table, dim=2)
        wide = () if use_kernel(q) else (torch.float64,)
        _checks.dtype(op, name, table, (torch.float32, *wide))
        if not table.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {table.stride()}; a contiguous table is needed")
    _checks.shape(op, "sin", sin, cos.shape, "that of cos")
    if not 2 <= 2 * cos.shape[1] <= q.shape[-1]:
        raise ValueError(
            f"{op}: cos has {cos.shape[1]} columns, one for each pair; q's heads have {q.shape[-1]} "
            f"elements: 1 to {q.shape[-1] // 2} pairs are needed"
        )
    seq = q.shape[-3]
    if positions is None:
        if seq > cos.shape[0]:
            raise ValueError(f"{op}: q has {seq} tokens, cos {cos.shape[0]} positions: one each is needed")
        return
    _checks.tensor(op, "positions", positions)
    _checks.dtype(op, "positions", positions, (torch.int64, torch.int32))
    # Not by ``in``: under torch.compile it compares sizes that may change by identity.
    if positions.shape != (seq,) and positions.shape != q.shape[:-2]:
        raise ValueError(
            f"{op}: positions has shape {tuple(positions.shape)}; {(seq,)} or {tuple(q.shape[:-2])} is needed"
        )
    if not positions.is_contiguous():
        raise ValueError(f"{op}: positions has strides {positions.stride()}; a contiguous tensor is needed")
    check_positions(op, angles)


def check_positions(op: str, angles: Angles) -> None:
    """Raise for a position that the tables do not have; on a CPU alone.

    On a GPU, where a check would stall, the kernel makes such a token NaN.
    """
    cos, _, positions, _ = angles
    if positions is None:
        return
    if positions.device.type == "cpu" and positions.numel() and not traced(positions):
        least, largest = int(positions.min()), int(positions.max())
        if least < 0 or largest >= cos.shape[0]:
            raise ValueError(
                f"{op}: positions goes from {least} to {largest}; cos has positions 0 to {cos.shape[0] - 1}"
            )


def _check_norm(op: str, q: torch.Tensor, k: torch.Tensor | None, norm: HeadNorm) -> None:
    _checks.eps(op, norm.eps)
    if norm.q_weight is None:
        return
    weights = (
        {"q_weight": norm.q_weight} if k is None else {"q_weight": norm.q_weight, "k_weight": norm.k_weight}
    )
    for name, weight in weights.items():
        _checks.tensor(op, name, weight)
        assert weight is not None
        _checks.dtype(op, name, weight, _checks.KERNEL_FLOATS if use_kernel(q) else _checks.FLOATS)
        _checks.shape(op, name, weight, q.shape[-1:], "the head dimension")
        _checks.last_dim_contiguous(op, name, weight)
        _checks.same_device(op, q=q, **{name: weight})
