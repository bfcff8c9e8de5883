"""Attention of one new token per sequence over a paged cache, in plain PyTorch."""

import torch


def sequence(cache: torch.Tensor, pages: torch.Tensor | int, length: int) -> torch.Tensor:
    """The first ``length`` rows of a sequence, ``(length, kv_heads, head_dim)``; one page gives a view."""
    if isinstance(pages, int):
        return cache[pages, :length]
    return cache[pages].flatten(0, 1)[:length]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One query ``(heads, head_dim)`` over ``(length, kv_heads, head_dim)``; zeros where length is 0."""
    dtype, heads = q.dtype, q.shape[0]
    if dtype in (torch.float16, torch.bfloat16):
        # On CPUs the products of half precision are slower than widening and multiplying in fp32.
        q, k, v = q.float(), k.float(), v.float()
    scores = torch.bmm((q * scale).view(k.shape[1], -1, k.shape[2]), k.permute(1, 2, 0))
    return torch.bmm(scores.softmax(-1), v.transpose(0, 1)).view(heads, -1).to(dtype)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    page_size = k_cache.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    begins = [0] * len(q) if starts is None else starts.tolist()
    out = torch.empty_like(q)
    for row, length in enumerate(seq_lens.tolist()):
        pages = page_table[row, : -(-length // page_size)].long()
        begin = begins[row] if window is None else max(begins[row], length - window)
        k, v = (sequence(cache, pages, length)[begin:] for cache in (k_cache, v_cache))
        out[row] = attend(q[row].contiguous(), k, v, scale)
    return out


def append_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    if bool((slots < 0).any()):
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    k_cache.flatten(0, 1).index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.flatten(0, 1).index_copy_(0, slots, v.to(v_cache.dtype))
