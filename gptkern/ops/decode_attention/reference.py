"""Attention of one new token per sequence over a paged cache, in plain PyTorch."""

import torch

from gptkern.ops.flash_attention.reference import attention_cpu


def sequence(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first ``length`` rows of a sequence, ``(length, kv_heads, head_dim)``; a view where it is one page."""
    page_size = cache.shape[1]
    if length <= page_size:
        return cache[int(pages[0]), :length]
    used = pages[: -(-length // page_size)].long()
    return cache[used].flatten(0, 1)[:length]


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    out = torch.empty_like(q)
    for row, length in enumerate(seq_lens.tolist()):
        k, v = (sequence(cache, page_table[row], length) for cache in (k_cache, v_cache))
        if window is not None:
            k, v = k[-window:], v[-window:]
        out[row] = attention_cpu(q[None, row, None], k[None], v[None], scale=scale)[0, 0]
    return out


def append_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    if bool((slots < 0).any()):
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    k_cache.flatten(0, 1).index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.flatten(0, 1).index_copy_(0, slots, v.to(v_cache.dtype))
