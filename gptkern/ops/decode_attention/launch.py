"""Launches of the decode attention kernels: grids, scratch memory, block sizes."""

from __future__ import annotations

import torch

from gptkern.ops import _launch, _pdl
from gptkern.ops._counters import counters
from gptkern.ops._triton import triton
from gptkern.ops._types import CachedSequences, PagedCache
from gptkern.ops.decode_attention import kernels

LOG2E = 1.4426950408889634
# Bounds of BLOCK_H, the query heads of one kv head that a program takes together: 16 is the narrowest tile of
# the matrix unit, and beyond 64 the accumulators do not fit in registers.
_MIN_BLOCK_H, _MAX_BLOCK_H = 16, 64
_PROGRAMS_PER_SM = 8
_COPY_ELEMENTS = 2048
# The window that means none: longer than any sequence.
_UNLIMITED = 2**31 - 1


def head_blocks(group: int) -> tuple[int, int]:
    """(BLOCK_H, blocks) of ``group`` query heads that share a key head."""
    block_h = min(max(_MIN_BLOCK_H, triton.next_power_of_2(group)), _MAX_BLOCK_H)
    return block_h, triton.cdiv(group, block_h)


def attend(
    q: torch.Tensor,
    cache: PagedCache,
    sequences: CachedSequences,
    scale: float,
    window: int | None,
    prefetch: bool = False,
    softcap: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Launch decode attention: (``(batch, heads, head_dim)`` in q's dtype, scratch memory)."""
    batch, heads, head_dim = q.shape
    page_count, page_size, kv_heads, _ = cache.k.shape
    table = sequences.page_table
    group = heads // kv_heads
    capacity = table.shape[1] * page_size
    config = _launch.config(
        "decode_attention",
        q.device,
        dtype="fp32" if q.dtype == torch.float32 else "half",
        head_dim=head_dim,
        capacity=capacity,
    )
    block_h, blocks = head_blocks(group)
    max_splits = triton.cdiv(capacity, config["SPLIT"])
    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    acc = torch.empty((batch, heads, max_splits, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((batch, heads, max_splits, 2), dtype=torch.float32, device=q.device)
    rows = batch * kv_heads
    most_programs = _PROGRAMS_PER_SM * _launch.multiprocessors(q.device)
    programs = max(1, min(max_splits, triton.cdiv(most_programs, max(rows * blocks, 1))))
    with _launch.on_device(q):
        _launch.launch(
            kernels.decode_attention_kernel,
            (rows, programs, blocks),
            *(q, cache.k, cache.v, out, *sequences, acc, stats, counters(q.device, rows * blocks)),
            *(cache.kv_scales or (None, None)),
            *(scale * LOG2E, _UNLIMITED if window is None else window),
            *(page_size, table.shape[1], page_count, max_splits),
            *(*q.stride()[:2], *cache.k.stride()[:3], *cache.v.stride()[:3], table.stride(0)),
            KV_HEADS=kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_H=block_h,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            IN_PAGE=page_size % config["BLOCK_N"] == 0,
            PREFETCH=prefetch,
            SOFTCAP=softcap or 0.0,
            **_pdl.options(q.device),
            **config,
        )
    return out, acc, stats


def append(k: torch.Tensor, v: torch.Tensor, cache: PagedCache, slots: torch.Tensor) -> None:
    """Launch the write of ``(tokens, kv_heads, head_dim)`` keys and values into the cache."""
    tokens, kv_heads, head_dim = k.shape
    page_count, page_size = cache.k.shape[:2]
    block_d = triton.next_power_of_2(head_dim)
    block_h = min(triton.next_power_of_2(kv_heads), max(1, _COPY_ELEMENTS // block_d))
    with _launch.on_device(k):
        _launch.launch(
            kernels.append_kv_kernel,
            (tokens, triton.cdiv(kv_heads, block_h)),
            *(k, v, cache.k, cache.v, slots, *(cache.kv_scales or (None, None)), page_size, page_count),
            *(*k.stride()[:2], *v.stride()[:2], *cache.k.stride()[:3], *cache.v.stride()[:3]),
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            num_warps=4,
        )
