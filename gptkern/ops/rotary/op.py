"""Rotary positions of queries and keys, after an RMS norm of each head or not."""

from __future__ import annotations

import torch

from gptkern.ops._dispatch import call_key, needs_grad, traced, use_kernel
from gptkern.ops._launch import Again, Plans, on_device, repeated
from gptkern.ops.rotary import checks, launch, reference, register
from gptkern.ops.rotary.launch import Angles, HeadNorm

_plans: Plans[Again] = Plans()


def rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    pairs: str = "halves",
    norm: tuple[torch.Tensor, torch.Tensor | None, float] | None = None,
    unit_offset: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotary positions of queries and keys in one launch (Su et al. 2021), with an RMS norm before or not.

    A pair (a, b) of a head's elements becomes ``(a cos - b sin, b cos + a sin)``. Computed in fp32 and
    rounded once.

    Args:
        q: ``(..., seq, heads, head_dim)``, head_dim at most 256; fp32, fp16 or bf16 (float64 on a CPU). The
            last dimension is contiguous; those before the heads must collapse to at most two strided loops.
        k: ``(..., seq, kv_heads, head_dim)`` of q's dtype, or None.
        cos: ``(context, dim / 2)`` fp32, contiguous: a row for each position, a column for each pair. The
            first ``dim`` elements of a head are turned, the others stay.
        sin: As cos. Neither gets a gradient.
        positions: int64 or int32, ``(seq,)`` or the shape of q before the heads; None means 0 to seq - 1. A
            position that the tables do not have is an error on a CPU; on a GPU, where a check would stall, it
            makes its token NaN.
        pairs: ``"halves"``: element i pairs with ``i + dim / 2``; ``"interleaved"``: 2 i with 2 i + 1.
        norm: ``(q_weight, k_weight, eps)`` of an RMS norm of each head before it is turned, weights
            ``(head_dim,)`` of any floating dtype; None: no norm.
        unit_offset: The norm's factors are ``1 + weight`` (Gemma).
        inplace: Write the results into q and k. Not where a gradient is needed.

    Returns:
        (q, k), contiguous, or with ``inplace`` the arguments themselves; None for a k that is None.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, layout, device or setting that is not accepted.
    """
    angles = Angles(cos, sin, positions, pairs)
    heads = HeadNorm(None, None, 0.0, False) if norm is None else HeadNorm(*norm, unit_offset)
    if k is None:
        heads = heads._replace(k_weight=None)
    tensors = (q, k, *angles[:3], *heads[:2])
    key = call_key(tensors, pairs, *heads[2:], inplace)
    if _plans.get(key) is None:
        checks.check("rotary", q, k, angles, heads)
    else:
        checks.check_positions("rotary", angles)
    grad = needs_grad(q, k, heads.q_weight, heads.k_weight)
    if needs_grad(cos, sin):
        raise ValueError("rotary: cos or sin requires grad; they get none: pass cos.detach(), sin.detach()")
    if inplace and grad:
        raise ValueError("rotary: inplace is True and an argument requires grad: use torch.no_grad()")
    kernel = use_kernel(q)
    if kernel and not traced(q) and not grad:
        with on_device(q):
            if inplace:  # nothing is allocated
                repeated(_plans, key, tensors, lambda: launch.turn(q, k, angles, heads, in_place=True)[:0])
                return q, k
            turned, turned_k = repeated(_plans, key, tensors, lambda: launch.turn(q, k, angles, heads))
        return turned, turned_k
    out = _out_of_place(q, k, angles, heads, kernel)
    if not inplace:
        return out
    q.copy_(out[0])
    if k is not None and out[1] is not None:
        k.copy_(out[1])
    return q, k


def _out_of_place(
    q: torch.Tensor, k: torch.Tensor | None, angles: Angles, heads: HeadNorm, kernel: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not kernel:
        norm = None if heads.q_weight is None else (heads.q_weight, heads.k_weight, heads.eps)
        return reference.rotary(q, k, *angles, norm, heads.unit_offset)
    if traced(q):
        out = torch.ops.gptkern.rotary(q, k, *register.flat(angles, heads))
        return out[0], None if k is None else out[1]
    out = register.Rotary.apply(q, k, *register.flat(angles, heads))
    return (out, None) if k is None else out
