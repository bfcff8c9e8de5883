"""flash-attn's cached attention, as a front of decode attention: the same call, the same meaning."""

from __future__ import annotations

import torch

from gptkern.ops import _checks
from gptkern.ops._types import CachedSequences, PagedCache
from gptkern.ops.decode_attention.op import append_kv, attend
from gptkern.ops.flash_attention import flash_attention_varlen

_OP = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor:
    """Attention of new queries over a cache that first takes the new keys and values, as in flash-attn 2.

    Args:
        q: ``(batch, seq_q, heads, head_dim)``. Several queries of a sequence are its last ones.
        k_cache, v_cache: ``(batch_cache, seq_cache, kv_heads, head_dim)``, or with ``block_table``
            ``(blocks, block_size, kv_heads, head_dim)``. Changed in place where k is given.
        k, v: ``(batch, seq_new, kv_heads, head_dim)``, written from ``cache_seqlens`` on.
        cache_seqlens: Tokens in the cache, k not counted: an int, or ``(batch,)`` int32. The whole
            cache when None.
        cache_batch_idx: ``(batch,)`` int32: the cache's row of each sequence.
        cache_leftpad: ``(batch,)`` int32: where each sequence starts in its row.
        block_table: ``(batch, max_blocks)`` int32.
        softmax_scale: ``1 / sqrt(head_dim)`` when None.
        causal: Queries see keys up to their own place, the last query being the last token.
        window_size: ``(left, right)`` keys seen around a query's place, -1 for all.
        rotary_cos, rotary_sin, rotary_interleaved, softcap, alibi_slopes, return_softmax_lse: At their
            defaults; anything else is refused.
        num_splits: Of no effect: splits follow the cache's geometry, so that results do not change
            with the batch.

    Returns:
        ``(batch, seq_q, heads, head_dim)``.

    Raises:
        TypeError, ValueError: an argument is not as described here.
    """
    refused = {
        "rotary_cos": rotary_cos is not None,
        "rotary_sin": rotary_sin is not None,
        "softcap": softcap != 0.0,
        "alibi_slopes": alibi_slopes is not None,
        "return_softmax_lse": return_softmax_lse,
    }
    for name, is_given in refused.items():
        if is_given:
            raise ValueError(f"{_OP}: {name} is not supported; leave it at its default")
    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.tensor(_OP, name, value, dim=4)
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: k and v must be given together")
    seq_q = q.shape[1]
    table = _page_table(q, k_cache, cache_batch_idx, block_table)
    lens = _lengths(q, k_cache, table, cache_seqlens)
    if k is not None and v is not None:
        lens = _append(k, v, k_cache, v_cache, table, lens)
    window = _window(seq_q, causal, window_size)
    cache, sequences = PagedCache(k_cache, v_cache), CachedSequences(table, lens, cache_leftpad)
    if seq_q == 1:
        return attend(_OP, q[:, 0], cache, sequences, softmax_scale, window)[:, None]
    return _attend_several(q, cache, sequences, softmax_scale, causal, window)


def _page_table(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    cache_batch_idx: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> torch.Tensor:
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError(f"{_OP}: cache_batch_idx and block_table cannot be given together")
        _checks.tensor(_OP, "block_table", block_table, dim=2)
        return block_table
    if cache_batch_idx is not None:
        _checks.tensor(_OP, "cache_batch_idx", cache_batch_idx, dim=1)
        return cache_batch_idx.to(torch.int32)[:, None]
    if q.shape[0] > k_cache.shape[0]:
        raise ValueError(f"{_OP}: k_cache has {k_cache.shape[0]} rows, q {q.shape[0]}: one each is needed")
    return torch.arange(q.shape[0], dtype=torch.int32, device=q.device)[:, None]


def _lengths(
    q: torch.Tensor, k_cache: torch.Tensor, table: torch.Tensor, cache_seqlens: int | torch.Tensor | None
) -> torch.Tensor:
    if isinstance(cache_seqlens, torch.Tensor):
        _checks.shape(_OP, "cache_seqlens", cache_seqlens, q.shape[:1], "one per sequence")
        _checks.dtype(_OP, "cache_seqlens", cache_seqlens, (torch.int32,))
        return cache_seqlens
    length = table.shape[1] * k_cache.shape[1] if cache_seqlens is None else cache_seqlens
    return torch.full(q.shape[:1], length, dtype=torch.int32, device=q.device)


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
) -> torch.Tensor:
    """Write k and v after the tokens in the cache; returns the new lengths."""
    _checks.tensor(_OP, "k", k, dim=4)
    _checks.tensor(_OP, "v", v, dim=4)
    _checks.shape(_OP, "k", k, (table.shape[0], k.shape[1], *k_cache.shape[2:]), "one row per sequence")
    _checks.shape(_OP, "v", v, k.shape, "the shape of k")
    page_size = k_cache.shape[1]
    positions = lens.long()[:, None] + torch.arange(k.shape[1], device=k.device)
    if (
        positions.device.type == "cpu"
        and positions.numel()
        and int(positions.max()) >= table.shape[1] * page_size
    ):
        raise ValueError(
            f"{_OP}: k brings a sequence to {int(positions.max()) + 1} tokens; "
            f"the cache holds {table.shape[1] * page_size}"
        )
    slots = table.gather(1, positions // page_size).long() * page_size + positions % page_size
    append_kv(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots.flatten())
    return (lens + k.shape[1]).to(torch.int32)


def _window(seq_q: int, causal: bool, window_size: tuple[int, int]) -> int | None:
    left, right = window_size
    # The last query has nothing to its right; of several, only the symmetric window is expressed.
    if seq_q > 1 and not causal and right != left:
        raise ValueError(f"{_OP}: window_size is {window_size}; without causal, left and right must be equal")
    return None if left < 0 else left + 1


def _attend_several(
    q: torch.Tensor,
    cache: PagedCache,
    sequences: CachedSequences,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Several queries a sequence: gather their keys, then packed attention."""
    batch, seq_q = q.shape[:2]
    table, lens, starts = sequences
    page_size = cache.k.shape[1]
    capacity = table.shape[1] * page_size
    tokens = torch.arange(capacity, device=q.device)
    attended = tokens[None, :] < lens[:, None]
    if starts is not None:
        attended &= tokens[None, :] >= starts[:, None]
    slots = (table.long().repeat_interleave(page_size, dim=1) * page_size + tokens % page_size)[attended]
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seq_q
    cu_seqlens_k = torch.nn.functional.pad(attended.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    out = flash_attention_varlen(
        q.flatten(0, 1),
        cache.k.flatten(0, 1)[slots],
        cache.v.flatten(0, 1)[slots],
        cu_seqlens_q,
        cu_seqlens_k,
        seq_q,
        capacity,
        causal=causal,
        scale=scale,
        window=window,
    )
    assert isinstance(out, torch.Tensor)
    return out.view(batch, seq_q, *out.shape[1:])
