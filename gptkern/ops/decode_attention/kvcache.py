"""flash-attn's cached attention, as a front of decode attention: the same call, the same meaning."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import traced
from gptkern.ops._types import CachedSequences, PagedCache
from gptkern.ops.decode_attention.op import append_kv, attend
from gptkern.ops.flash_attention import checks, paged
from gptkern.ops.flash_attention import op as flash
from gptkern.ops.flash_attention.flash_attn import options_of
from gptkern.ops.flash_attention.launch import Extras, Options, Packed
from gptkern.ops.rotary import rotary

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
) -> Any:
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
        rotary_cos, rotary_sin: ``(positions, pairs)``: q and k are turned by their places in the cache before
            k is written; without ``causal`` or a window all queries stand at the first new place. Only with
            k.
        rotary_interleaved: Element 2 i turns with 2 i + 1, else i with ``i + pairs``.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; 0 for none.
        alibi_slopes: ``(heads,)`` or ``(batch, heads)`` fp32: a slope times a key's distance from the query's
            place is taken off its score. The keys are then copied first.
        return_softmax_lse: Also return the log-sum-exp of the scores. The keys are then copied first.
        num_splits: Of no effect: splits follow the cache's geometry, so that results do not change
            with the batch.

    Returns:
        ``(batch, seq_q, heads, head_dim)``; with ``return_softmax_lse`` also ``(batch, heads, seq_q)`` fp32.

    Raises:
        TypeError, ValueError: an argument is not as described here.
    """
    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.tensor(_OP, name, value, dim=4)
    checks.check_slopes(_OP, q, None, alibi_slopes)
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: k and v must be given together")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{_OP}: rotary_cos and rotary_sin must be given together")
    seq_q = q.shape[1]
    options = options_of(_OP, q, causal, window_size, softmax_scale, softcap)
    sides = (options.window_left, options.window_right)
    table = _page_table(q, k_cache, cache_batch_idx, block_table)
    lens = _lengths(q, k_cache, table, cache_seqlens)
    if rotary_cos is not None and rotary_sin is not None:
        local = causal or window_size != (-1, -1)
        q, k = _turn(q, k, (rotary_cos, rotary_sin), lens, rotary_interleaved, local)
    if k is not None and v is not None:
        lens = _append(k, v, k_cache, v_cache, table, lens)
    cache, sequences = PagedCache(k_cache, v_cache), CachedSequences(table, lens, cache_leftpad)
    if seq_q == 1 and not return_softmax_lse and alibi_slopes is None:
        # The last token has nothing to its right.
        window = None if sides[0] < 0 else sides[0] + 1
        return attend(_OP, q[:, 0], cache, sequences, options.scale, window, softcap=options.softcap or None)[
            :, None
        ]
    return _attend_several(q, cache, sequences, options, return_softmax_lse, alibi_slopes)


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
    capacity = table.shape[1] * k_cache.shape[1]
    if isinstance(cache_seqlens, torch.Tensor):
        _checks.shape(_OP, "cache_seqlens", cache_seqlens, q.shape[:1], "one per sequence")
        _checks.dtype(_OP, "cache_seqlens", cache_seqlens, (torch.int32,))
        # On a GPU, where this check would stall, what is too long is NaN or cut off.
        if cache_seqlens.device.type == "cpu" and cache_seqlens.numel() and not traced(cache_seqlens):
            least, longest = int(cache_seqlens.min()), int(cache_seqlens.max())
            if least < 0 or longest > capacity:
                raise ValueError(
                    f"{_OP}: cache_seqlens goes from {least} to {longest}; "
                    f"the cache holds 0 to {capacity} tokens"
                )
        return cache_seqlens
    length = capacity if cache_seqlens is None else cache_seqlens
    if not 0 <= length <= capacity:
        raise ValueError(f"{_OP}: cache_seqlens is {length}; the cache holds 0 to {capacity} tokens")
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
    capacity = table.shape[1] * page_size
    if positions.device.type == "cpu" and positions.numel() and int(positions.max()) >= capacity:
        raise ValueError(
            f"{_OP}: k brings a sequence to {int(positions.max()) + 1} tokens; the cache holds {capacity}"
        )
    # On a GPU, where that check would stall, such a token is written nowhere.
    inside = (positions >= 0) & (positions < capacity)
    pages = table.gather(1, (positions * inside) // page_size).long()
    slots = torch.where(inside, pages * page_size + positions % page_size, -1)
    append_kv(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots.flatten())
    return (lens + k.shape[1]).to(torch.int32)


def _turn(
    q: torch.Tensor,
    k: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor],
    lens: torch.Tensor,
    interleaved: bool,
    local: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned by their places, from ``lens`` on; queries that are not ``local`` stand at the first."""
    if k is None:
        raise ValueError(f"{_OP}: rotary_cos is given without k; queries are turned beside new keys alone")
    cos, sin = (table.float() for table in tables)
    pairs = "interleaved" if interleaved else "halves"
    steps = torch.arange(max(q.shape[1], k.shape[1]), device=q.device)
    places = lens.long()[:, None] + steps[None, :]
    q_places = places[:, : q.shape[1]] if local else places[:, :1].expand(-1, q.shape[1])
    turned_q, _ = rotary(q, None, cos, sin, q_places.contiguous(), pairs=pairs)
    turned_k, _ = rotary(k, None, cos, sin, places[:, : k.shape[1]].contiguous(), pairs=pairs)
    return turned_q, turned_k


def _attend_several(
    q: torch.Tensor,
    cache: PagedCache,
    sequences: CachedSequences,
    options: Options,
    return_lse: bool,
    slopes: torch.Tensor | None,
) -> Any:
    """Several queries a sequence: copy their keys, then packed attention."""
    batch, seq_q = q.shape[:2]
    table, lens, starts = sequences
    capacity = table.shape[1] * cache.k.shape[1]
    held = lens if starts is None else lens - starts
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seq_q
    cu_seqlens_k = torch.nn.functional.pad(held.clamp(0, capacity).cumsum(0), (1, 0)).to(torch.int32)
    k, v = paged.packed(cache.k, cache.v, table, cu_seqlens_k, capacity, starts)
    packed = Packed(cu_seqlens_q, cu_seqlens_k, seq_q, capacity)
    rows = q.flatten(0, 1)
    checks.check(_OP, rows, k, v, packed)
    result = flash.attend(rows, k, v, packed, options, return_lse, Extras(None, slopes))
    if not return_lse:
        assert isinstance(result, torch.Tensor)
        return result.view(batch, seq_q, *result.shape[1:])
    out, lse = result
    return out.view(batch, seq_q, *out.shape[1:]), lse.view(-1, batch, seq_q).transpose(0, 1)
