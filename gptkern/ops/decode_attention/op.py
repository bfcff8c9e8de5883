"""Attention over the paged KV cache, and writing into it."""

from __future__ import annotations

import torch

from gptkern.ops.decode_attention import reference


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of the newest token of each sequence over that sequence's pages.

    Args:
        q: ``(batch, heads, head_dim)``.
        k_cache, v_cache: ``(pages, page_size, kv_heads, head_dim)``.
        page_table: ``(batch, max_pages)`` int32: the pages of each sequence, in order.
        seq_lens: ``(batch,)`` int32: tokens each sequence attends, the newest included.
    """
    return reference.decode_attention(q, k_cache, v_cache, page_table, seq_lens, scale, window)


def append_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write new keys and values ``(tokens, kv_heads, head_dim)`` into the cache, in place.

    Args:
        slots: ``(tokens,)`` int64, ``page * page_size + offset`` of each token; -1 writes nothing.
    """
    reference.append_kv(k, v, k_cache, v_cache, slots)
