"""Attention of one new token per sequence over a paged cache, in plain PyTorch."""

import torch

from gptkern.ops._types import FP8, FP8_MAX, KvScales


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``(..., kv_heads, head_dim)`` in e4m3; beyond its range the largest number, NaN stays NaN."""
    return (x.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def from_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What ``to_fp8`` kept, rounded to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (x.to(wide) * scale[:, None].to(wide)).to(dtype)


def widened(
    k: torch.Tensor, v: torch.Tensor, scales: KvScales | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in ``dtype`` where they are of an fp8 cache; of any other as they are."""
    return (k, v) if scales is None else (from_fp8(k, scales[0], dtype), from_fp8(v, scales[1], dtype))


def rows(cache: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``cache[places]``, of fp8 as well, which PyTorch does not index on every device."""
    if cache.dtype != FP8:
        return cache[places]
    return cache.view(torch.uint8)[places].view(FP8)


def sequence(cache: torch.Tensor, pages: torch.Tensor | int, length: int) -> torch.Tensor:
    """The first ``length`` rows of a sequence, ``(length, kv_heads, head_dim)``.

    A number in place of pages is the first of neighbouring ones, of a contiguous cache: a view.
    """
    if isinstance(pages, int):
        return cache.view(-1, *cache.shape[2:])[pages * cache.shape[1] :][:length]
    return rows(cache, pages).flatten(0, 1)[:length]


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
    scales: KvScales | None = None,
) -> torch.Tensor:
    page_size = k_cache.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    begins = [0] * len(q) if starts is None else starts.tolist()
    out = torch.empty_like(q)
    for row, length in enumerate(seq_lens.tolist()):
        pages = page_table[row, : -(-length // page_size)].long()
        begin = begins[row] if window is None else max(begins[row], length - window)
        k, v = (sequence(cache, pages, length)[begin:] for cache in (k_cache, v_cache))
        if scales is not None:
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            k, v = widened(k, v, scales, wide)
            out[row] = attend(q[row].contiguous().to(wide), k, v, scale)
            continue
        out[row] = attend(q[row].contiguous(), k, v, scale)
    return out


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    scales: KvScales | None = None,
) -> None:
    if bool((slots < 0).any()):
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    if scales is not None:
        # As bytes: PyTorch does not write fp8 by index on every device.
        k, v = (to_fp8(new, of).view(torch.uint8) for new, of in zip((k, v), scales, strict=True))
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    # By page and offset: of a cache that is a slice, pages and offsets do not flatten into one dimension.
    places = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache.index_put_(places, k.to(k_cache.dtype))
    v_cache.index_put_(places, v.to(v_cache.dtype))
