"""Attention of one new token per sequence over a paged cache, in plain PyTorch."""

import torch

from gptkern.ops._types import FP8, FP8_MAX, KvScales


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x / scale`` in e4m3, ``(..., kv_heads, head_dim)``: clamped to its range; NaN stays NaN."""
    return (x.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def from_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x * scale``, computed in fp32 (float64 for that dtype) and rounded to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (x.to(wide) * scale[:, None].to(wide)).to(dtype)


def widened(
    k: torch.Tensor, v: torch.Tensor, kv_scales: KvScales | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of an fp8 cache, dequantised to ``dtype``; those of any other cache unchanged."""
    if kv_scales is None:
        return k, v
    return from_fp8(k, kv_scales[0], dtype), from_fp8(v, kv_scales[1], dtype)


def rows(cache: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``cache[places]``, also for fp8, which PyTorch cannot index on every device."""
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


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """One query ``(heads, head_dim)`` over ``(length, kv_heads, head_dim)``; zeros where length is 0."""
    dtype, heads = q.dtype, q.shape[0]
    if dtype in (torch.float16, torch.bfloat16):
        # On CPUs the products of half precision are slower than widening and multiplying in fp32.
        q, k, v = q.float(), k.float(), v.float()
    scores = torch.bmm((q * scale).view(k.shape[1], -1, k.shape[2]), k.permute(1, 2, 0))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
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
    softcap: float | None = None,
) -> torch.Tensor:
    """``(batch, heads, head_dim)``: each sequence's query over tokens ``starts[i]`` on, or its window."""
    page_size = k_cache.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    first_tokens = [0] * len(q) if starts is None else starts.tolist()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtype = q.dtype if scales is None else wide
    out = torch.empty_like(q)
    for row, length in enumerate(seq_lens.tolist()):
        pages = page_table[row, : -(-length // page_size)].long()
        first = first_tokens[row] if window is None else max(first_tokens[row], length - window)
        k, v = (sequence(cache, pages, length)[first:] for cache in (k_cache, v_cache))
        k, v = widened(k, v, scales, dtype)
        out[row] = attend(q[row].contiguous().to(dtype), k, v, scale, softcap)
    return out


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    scales: KvScales | None = None,
) -> None:
    """Write keys and values to their slots, in place; a negative slot writes nothing."""
    if bool((slots < 0).any()):
        written = slots >= 0
        k, v, slots = k[written], v[written], slots[written]
    if scales is not None:
        # As bytes: PyTorch cannot write fp8 by index on every device.
        k, v = (to_fp8(x, scale).view(torch.uint8) for x, scale in zip((k, v), scales, strict=True))
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    # By page and offset: the pages and offsets of a cache that is a slice do not flatten into one dimension.
    places = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache.index_put_(places, k.to(k_cache.dtype))
    v_cache.index_put_(places, v.to(v_cache.dtype))
