"""Argument errors of decode attention and of writes into the cache."""

from __future__ import annotations

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import traced, use_kernel
from gptkern.ops._types import FP8, CachedSequences, PagedCache

MAX_HEAD_DIM = 256


def check_cache(op: str, cache: PagedCache) -> None:
    """Raise for a cache that no op accepts, or kv scales that do not fit it."""
    for name, value in (("k_cache", cache.k), ("v_cache", cache.v)):
        _checks.tensor(op, name, value, dim=4)
        floats = _checks.KERNEL_FLOATS if use_kernel(value) else _checks.FLOATS
        _checks.dtype(op, name, value, floats if cache.kv_scales is None else (FP8,))
        _checks.last_dim_contiguous(op, name, value)
    _checks.shape(op, "v_cache", cache.v, cache.k.shape, "the shape of k_cache")
    if cache.v.dtype != cache.k.dtype:
        raise TypeError(f"{op}: v_cache is {cache.v.dtype}, k_cache {cache.k.dtype}: one dtype is needed")
    if not 1 <= cache.k.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: k_cache has head dimension {cache.k.shape[3]}; 1 to {MAX_HEAD_DIM} are accepted"
        )
    if cache.kv_scales is None:
        return
    if traced(cache.k):
        raise ValueError(f"{op}: the cache is fp8; torch.compile takes it in 16 or 32 bits")
    _checks.fp8_device(op, "the cache", cache.k.device)
    _checks.kv_scales(op, cache.kv_scales, cache.k.shape[2:3], "one per head of the cache")
    k_scale, v_scale = cache.kv_scales
    _checks.same_device(op, k_cache=cache.k, k_scale=k_scale, v_scale=v_scale)


def check_slots(op: str, cache: PagedCache, slots: torch.Tensor, count: int) -> None:
    """Raise for anything but ``count`` int64 slots; on a CPU also for a slot beyond the cache."""
    _checks.tensor(op, "slots", slots, dim=1)
    _checks.dtype(op, "slots", slots, (torch.int64,))
    _checks.shape(op, "slots", slots, (count,), "one per token")
    _checks.same_device(op, k_cache=cache.k, slots=slots)
    check_slot_values(op, cache, slots)


def check_slot_values(op: str, cache: PagedCache, slots: torch.Tensor) -> None:
    """Raise for a slot beyond the cache; on a CPU alone."""
    if slots.device.type != "cpu" or not slots.numel() or traced(slots):
        return
    capacity = cache.k.shape[0] * cache.k.shape[1]
    if int(slots.max()) >= capacity:
        raise ValueError(f"{op}: slots holds {int(slots.max())}; the cache has slots 0 to {capacity - 1}")


def check_append(op: str, k: torch.Tensor, v: torch.Tensor, cache: PagedCache, slots: torch.Tensor) -> None:
    """Raise for arguments that ``append_kv`` does not accept."""
    check_cache(op, cache)
    for name, value in (("k", k), ("v", v)):
        _checks.tensor(op, name, value, dim=3)
        _checks.dtype(op, name, value)
        _checks.shape(op, name, value, (k.shape[0], *cache.k.shape[2:]), "tokens, and the cache's heads")
        _checks.last_dim_contiguous(op, name, value)
    _checks.same_device(op, k=k, v=v, k_cache=cache.k, v_cache=cache.v)
    check_slots(op, cache, slots, k.shape[0])


def check_attend(
    op: str,
    q: torch.Tensor,
    cache: PagedCache,
    sequences: CachedSequences,
    scale: float | None,
    window: int | None,
    softcap: float | None = None,
) -> None:
    """Raise for arguments that ``decode_attention`` does not accept."""
    _checks.tensor(op, "q", q, dim=3)
    check_cache(op, cache)
    if cache.kv_scales is not None:
        _checks.dtype(op, "q", q, _checks.KERNEL_FLOATS if use_kernel(q) else _checks.FLOATS)
    elif q.dtype != cache.k.dtype:
        raise TypeError(f"{op}: q is {q.dtype}, the cache {cache.k.dtype}: one dtype is needed")
    _checks.last_dim_contiguous(op, "q", q)
    heads, head_dim = q.shape[1:]
    kv_heads = cache.k.shape[2]
    if head_dim != cache.k.shape[3]:
        raise ValueError(
            f"{op}: q has head dimension {head_dim}, the cache {cache.k.shape[3]}: they must be equal"
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{op}: k_cache has {kv_heads} heads, q has {heads}: q's must be a multiple of k_cache's"
        )
    _check_sequences(op, q, cache, sequences)
    if scale is not None:
        _checks.finite(op, "scale", scale)
    _checks.positive(op, "softcap", softcap, none=True)
    _checks.whole(op, "window", window, 1, none=True)


def _check_sequences(op: str, q: torch.Tensor, cache: PagedCache, sequences: CachedSequences) -> None:
    _checks.tensor(op, "page_table", sequences.page_table, dim=2)
    _checks.tensor(op, "seq_lens", sequences.seq_lens, dim=1)
    for name, value in sequences._asdict().items():
        if value is None:
            continue
        _checks.dtype(op, name, value, (torch.int32,))
        if value.shape[0] != q.shape[0]:
            raise ValueError(
                f"{op}: {name} has {value.shape[0]} rows, q {q.shape[0]}: one per sequence is needed"
            )
        _checks.last_dim_contiguous(op, name, value)
    _checks.same_device(op, q=q, k_cache=cache.k, v_cache=cache.v, **sequences._asdict())
    check_sequence_values(op, cache, sequences)


def check_sequence_values(op: str, cache: PagedCache, sequences: CachedSequences) -> None:
    """Raise for a length or a page out of range; on a CPU alone."""
    page_table, seq_lens, _ = sequences
    if seq_lens.device.type != "cpu" or not seq_lens.shape[0] or traced(seq_lens):
        return
    pages, page_size = cache.k.shape[:2]
    capacity = page_table.shape[1] * page_size
    least, longest = int(seq_lens.min()), int(seq_lens.max())
    if least < 0 or longest > capacity:
        raise ValueError(
            f"{op}: seq_lens goes from {least} to {longest}; "
            f"{page_table.shape[1]} pages hold 0 to {capacity} tokens"
        )
    first_tokens = torch.arange(page_table.shape[1], device=page_table.device) * page_size
    needed = first_tokens[None, :] < seq_lens[:, None]
    outside = page_table[needed & ((page_table < 0) | (page_table >= pages))]
    if outside.numel():
        raise ValueError(f"{op}: page_table holds {int(outside[0])}; the cache has pages 0 to {pages - 1}")
