"""Launches of the kernels for Hopper: the calls that they serve, their tensor maps, their grids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptkern.ops import _launch
from gptkern.ops._gluon import descriptor
from gptkern.ops._hopper import runs_gluon
from gptkern.ops.flash_attention.kernels_hopper import BLOCK_M, ROWS, flash_attention_forward_hopper
from gptkern.ops.flash_attention.kernels_hopper_backward import flash_attention_backward_hopper
from gptkern.ops.flash_attention.kernels_hopper_delta import flash_attention_delta
from gptkern.ops.flash_attention.kernels_hopper_producer import BLOCK_N

if TYPE_CHECKING:
    from gptkern.ops.flash_attention.launch import Extras, Options, Shape

# Keys and values of the heads whose tiles go together: a third of an H100's L2 cache.
_SECTION_BYTES = 16 << 20


def _mapped(x: torch.Tensor) -> bool:
    """True if the copy engine can read ``x``."""
    steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    wide = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    return x.stride(-1) == 1 and wide and x.data_ptr() % 16 == 0


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, o: Options) -> bool:
    """True if the kernels compute this call, forward and backward, on q's device.

    Lengths are not asked for: a sequence has the same bits alone and among others.
    """
    plain = o.softcap == 0.0 and o.dropout_p == 0.0 and all(extra is None for extra in extras)
    return (
        runs_gluon(q)
        and plain
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in (64, 128)
        and all(x.numel() > 0 and _mapped(x) for x in (q, k, v))
    )


def _heads_of(x: torch.Tensor, rows: int) -> Any:
    """A map of ``(batch, seq, heads, head_dim)`` or ``(tokens, heads, head_dim)``; a tile: rows of a head."""
    return descriptor(x if x.dim() == 4 else x.unsqueeze(0), [1, rows, 1, x.shape[-1]])


def _flags(shape: Shape, o: Options) -> dict[str, Any]:
    flags = shape.constants(o)
    return {name: flags[name] for name in ("HEAD_DIM", "VARLEN", "HAS_LEFT", "HAS_RIGHT")}


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    shape: Shape,
    o: Options,
) -> None:
    """Launch the kernel; ``out`` and ``lse`` are contiguous."""
    row = _launch.config("flash_attention_forward_hopper", q.device, head_dim=shape.head_dim)
    blocks = -(-shape.extents[0] // BLOCK_M.value)
    total = blocks * shape.heads * shape.sequences
    programs = min(total, _launch.multiprocessors(q.device))
    group = shape.heads // shape.heads_k
    head_bytes = 2 * shape.extents[1] * shape.head_dim * k.element_size()
    section = max(1, _SECTION_BYTES // head_bytes) * group
    _launch.launch(
        flash_attention_forward_hopper,
        (programs,),
        *(_heads_of(q, ROWS.value), *(_heads_of(x, row["BLOCK_N"]) for x in (k, v)), out, lse),
        *(*shape.offsets, shape.sequences, shape.heads, group, *shape.extents),
        *(o.window_left, o.window_right, o.scale, section, blocks, total, programs),
        **_flags(shape, o),
        **row,
    )


def _rows_of_queries(shape: Shape, block_m: int) -> int:
    """Rows of a head where each sequence's queries begin at a multiple of ``block_m``."""
    if shape.packed:
        return (-(-shape.extents[2] // block_m) + shape.sequences) * block_m
    return -(-shape.extents[0] // block_m) * block_m


def _launch_delta(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    shape: Shape,
    o: Options,
    block_m: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp and delta of 64 queries after the other, the turns of dq's sums so far)."""
    padded = _rows_of_queries(shape, block_m)
    rows = padded * shape.heads * (1 if shape.packed else shape.sequences)
    stats = torch.empty(2 * rows, dtype=torch.float32, device=do.device)
    turns = torch.empty(rows // block_m, dtype=torch.int32, device=do.device)
    _launch.launch(
        flash_attention_delta,
        shape.grid(block_m),
        *(out, do, lse, dlse, stats, turns, dq, *shape.offsets),
        *(shape.heads, *shape.extents, o.window_left, o.window_right, padded, *shape.strides(do)),
        **_flags(shape, o),
        BLOCK_M=block_m,
        BLOCK_KEYS=int(BLOCK_N.value),
        **_launch.config("flash_attention_delta", do.device, head_dim=shape.head_dim),
    )
    return stats, turns


def backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    shape: Shape,
    o: Options,
) -> None:
    """Launch both kernels; all but q, k, v and do are contiguous, and so are ``gradients``: dq, dk, dv."""
    do = do if _mapped(do) else do.contiguous()
    row = _launch.config("flash_attention_backward_hopper", q.device, head_dim=shape.head_dim)
    stats, turns = _launch_delta(do, dlse, out, lse, gradients[0], shape, o, row["BLOCK_M"])
    sums = torch.empty((stats.numel() // 2, shape.head_dim), dtype=torch.float32, device=q.device)
    max_q, max_k = shape.extents[:2]
    blocks = -(-max_k // BLOCK_N.value)
    total = blocks * shape.heads_k * shape.sequences
    programs = min(total, _launch.multiprocessors(q.device))
    group = shape.heads // shape.heads_k
    # Keys and values, queries and output gradients, and the sums of dq.
    head_bytes = shape.head_dim * (2 * k.element_size() * (max_k + group * max_q) + 4 * group * max_q)
    section = max(1, _SECTION_BYTES // head_bytes)
    _launch.launch(
        flash_attention_backward_hopper,
        (programs,),
        *(*(_heads_of(x, ROWS.value) for x in (q, k, v, do)), *gradients, stats, turns, sums),
        *(*shape.offsets, shape.sequences, shape.heads_k, group, *shape.extents),
        *(o.window_left, o.window_right, o.scale, section, blocks, total, programs),
        _rows_of_queries(shape, row["BLOCK_M"]),
        **_flags(shape, o),
        **row,
        # Programs wait for each other: all are to be resident.
        launch_cooperative_grid=True,
    )
