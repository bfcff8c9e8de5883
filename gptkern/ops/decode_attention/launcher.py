"""From tensors to launches of the decode attention kernels: grids, scratch, block sizes."""

from __future__ import annotations

import torch
import triton

from gptkern.ops import _launch, _pdl
from gptkern.ops._counters import counters
from gptkern.ops._types import KvScales
from gptkern.ops.decode_attention import kernels

LOG2E = 1.4426950408889634
# Query heads that share keys and are taken together: the matrix unit's narrow side, and the most that
# registers hold beside their accumulators.
LEAST_HEADS, _MOST_HEADS = 16, 64
_PROGRAMS_PER_SM = 8
_COPY_ELEMENTS = 2048
# Longer than any sequence: no window.
_UNLIMITED = 2**31 - 1


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int | None,
    starts: torch.Tensor | None,
    prefetch: bool = False,
    scales: KvScales | None = None,
) -> torch.Tensor:
    """Decode attention by the kernel."""
    batch, heads, head_dim = q.shape
    page_count, page_size, kv_heads, _ = k_cache.shape
    group = heads // kv_heads
    capacity = page_table.shape[1] * page_size
    config = _launch.config(
        "decode_attention",
        q.device,
        dtype="fp32" if q.dtype == torch.float32 else "half",
        head_dim=head_dim,
        capacity=capacity,
    )
    block_h = min(max(LEAST_HEADS, triton.next_power_of_2(group)), _MOST_HEADS)
    head_blocks = triton.cdiv(group, block_h)
    max_splits = triton.cdiv(capacity, config["SPLIT"])
    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    acc = torch.empty((batch, heads, max_splits, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((batch, heads, max_splits, 2), dtype=torch.float32, device=q.device)
    rows = batch * kv_heads
    wanted = _PROGRAMS_PER_SM * _launch.multiprocessors(q.device)
    programs = max(1, min(max_splits, triton.cdiv(wanted, max(rows * head_blocks, 1))))
    with _launch.on_device(q):
        _launch.launch(
            kernels.decode_attention_kernel, (rows, programs, head_blocks),
            q, k_cache, v_cache, out, page_table, seq_lens, starts, acc, stats,
            counters(q.device, rows * head_blocks), *(scales or (None, None)),
            scale * LOG2E, _UNLIMITED if window is None else window,
            page_size, page_table.shape[1], page_count, max_splits,
            *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], page_table.stride(0),
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_H=block_h,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            IN_PAGE=page_size % config["BLOCK_N"] == 0, PREFETCH=prefetch, **_pdl.options(q.device), **config,
        )  # fmt: skip
    return out


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    scales: KvScales | None = None,
) -> None:
    """Write keys and values into the cache by the kernel."""
    tokens, kv_heads, head_dim = k.shape
    block_d = triton.next_power_of_2(head_dim)
    block_h = min(triton.next_power_of_2(kv_heads), max(1, _COPY_ELEMENTS // block_d))
    with _launch.on_device(k):
        _launch.launch(
            kernels.append_kv_kernel, (tokens, triton.cdiv(kv_heads, block_h)),
            k, v, k_cache, v_cache, slots, *(scales or (None, None)), k_cache.shape[1], k_cache.shape[0],
            *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
