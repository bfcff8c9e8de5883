"""Launches of the kernel for Hopper: the calls that it serves, its tensor maps, its grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptkern.ops import _launch
from gptkern.ops._gluon import descriptor
from gptkern.ops._hopper import runs_gluon
from gptkern.ops.flash_attention.kernels_hopper import BLOCK_M, ROWS, flash_attention_forward_hopper

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
    """True if the kernel computes this call on q's device.

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
    flags = shape.constants(o)
    _launch.launch(
        flash_attention_forward_hopper,
        (programs,),
        *(_heads_of(q, ROWS.value), *(_heads_of(x, row["BLOCK_N"]) for x in (k, v)), out, lse),
        *(*shape.offsets, shape.sequences, shape.heads, group, *shape.extents),
        *(o.window_left, o.window_right, o.scale, section, blocks, total, programs),
        **{name: flags[name] for name in ("HEAD_DIM", "VARLEN", "HAS_LEFT", "HAS_RIGHT")},
        **row,
    )
