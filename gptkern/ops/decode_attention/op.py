"""Attention of one new token per sequence over a paged KV cache, and writing into it."""

from __future__ import annotations

import math
from typing import Any

import torch

from gptkern.ops._dispatch import call_key, needs_grad, traced, use_kernel
from gptkern.ops._launch import Plans, on_device, repeated
from gptkern.ops._types import CachedSequences, KvScales, PagedCache
from gptkern.ops.decode_attention import checks, launch, reference, register  # noqa: F401  (torch.ops)

_plans: Plans[Any] = Plans()


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    prefetch: bool = False,
    scales: KvScales | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of the newest token of each sequence over that sequence's pages (Flash-Decoding, 2023).

    Sequences are split at fixed places and combined in a fixed order: a sequence's result is bitwise
    the same alone and in any batch, and wherever its pages lie. Forward only.

    Args:
        q: ``(batch, heads, head_dim)``, fp32, fp16 or bf16 (float64 on a CPU), head_dim at most 256.
            Any strides with a contiguous last dimension.
        k_cache, v_cache: ``(pages, page_size, kv_heads, head_dim)`` of q's dtype; heads is a multiple
            of kv_heads, query head i attends with ``i // (heads / kv_heads)``.
        page_table: ``(batch, max_pages)`` int32: the pages of each sequence, in order. Pages past a
            sequence's length are never read.
        seq_lens: ``(batch,)`` int32: tokens that each sequence attends to, the newest included; 0 gives
            zeros. A page that the cache does not have, or a length that the page table has no room for, is
            an error on a CPU; on a GPU, where a check would stall, it makes that sequence's result NaN.
        scale: Factor on the scores; ``1 / sqrt(head_dim)`` when None.
        window: Attend to the newest ``window`` tokens only.
        prefetch: On sm_90 and newer, begin to fetch pages while the kernel before this one in the
            stream still runs. That kernel must not write ``page_table`` or ``seq_lens``.
        scales: (k_scale, v_scale) of an fp8 (e4m3) cache, ``(kv_heads,)`` fp32: the factors that dequantise
            keys and values. None for any other cache. Not served under ``torch.compile``.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; None: they stay.

    Returns:
        ``(batch, heads, head_dim)``, contiguous, in q's dtype.

    Raises:
        TypeError, ValueError: an argument is not as described here, or q requires grad on a GPU.
    """
    cache, sequences = PagedCache(k_cache, v_cache, scales), CachedSequences(page_table, seq_lens)
    return attend("decode_attention", q, cache, sequences, scale, window, prefetch, softcap)


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    scales: KvScales | None = None,
) -> None:
    """Write new keys and values into the cache, in place.

    Args:
        k, v: ``(tokens, kv_heads, head_dim)``, any floating dtype: cast to the cache's. Any strides with
            a contiguous last dimension.
        k_cache, v_cache: ``(pages, page_size, kv_heads, head_dim)``.
        slots: ``(tokens,)`` int64, ``page * page_size + offset`` of each token; a negative one writes
            nothing. No two tokens may have one slot. One beyond the cache is an error on a CPU; on a GPU,
            where a check would stall, it writes nothing.
        scales: (k_scale, v_scale) of an fp8 cache, as in ``decode_attention``. Values beyond e4m3's range
            become its largest number.

    Raises:
        TypeError, ValueError: an argument is not as described here.
    """
    cache = PagedCache(k_cache, v_cache, scales)
    tensors = (k, v, k_cache, v_cache, slots, *(scales or ()))
    key = call_key(tensors, "append_kv", scales is None)
    if _plans.get(key) is None:
        checks.check_append("append_kv", k, v, cache, slots)
    else:
        checks.check_slot_values("append_kv", cache, slots)
    if traced(k):
        torch.ops.gptkern.append_kv(k, v, k_cache, v_cache, slots)
    elif use_kernel(k):
        with on_device(k):
            repeated(_plans, key, tensors, lambda: launch.append(k.detach(), v.detach(), cache, slots))
    else:
        reference.append_kv(k.detach(), v.detach(), k_cache, v_cache, slots, scales)


def attend(
    op: str,
    q: torch.Tensor,
    cache: PagedCache,
    sequences: CachedSequences,
    scale: float | None,
    window: int | None,
    prefetch: bool = False,
    softcap: float | None = None,
) -> torch.Tensor:
    """``decode_attention``, with errors under the name ``op``."""
    tensors = (q, *cache[:2], *sequences, *(cache.kv_scales or ()))
    key = call_key(tensors, "attend", scale, window, prefetch, softcap, cache.kv_scales is None)
    if _plans.get(key) is None:
        checks.check_attend(op, q, cache, sequences, scale, window, softcap)
    else:
        checks.check_sequence_values(op, cache, sequences)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    table, lens, starts = sequences
    if traced(q):
        out: torch.Tensor = torch.ops.gptkern.decode_attention(
            q, cache.k, cache.v, table, lens, scale, window, starts, softcap
        )
        return out
    if not use_kernel(q):
        return reference.decode_attention(
            q, cache.k, cache.v, table, lens, scale, window, starts, cache.kv_scales, softcap
        )
    if needs_grad(q):
        raise ValueError(f"{op}: q requires grad; decode attention is forward only: use torch.no_grad()")
    with on_device(q):
        new = repeated(
            _plans,
            key,
            tensors,
            lambda: launch.attend(q, cache, sequences, scale, window, prefetch, softcap),
        )
    out = new[0]
    return out
