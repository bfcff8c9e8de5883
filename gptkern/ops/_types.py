"""Types that several ops take, and everything above them."""

from __future__ import annotations

from typing import NamedTuple

import torch

# The number format of an 8-bit KV cache: e4m3, whose largest number is 448.
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

# (k_scale, v_scale), fp32 of shape (kv_heads,): the factors that dequantise an fp8 KV cache.
KvScales = tuple[torch.Tensor, torch.Tensor]

# (weight, bias, eps) of a layer norm over the last dimension; the bias may be None.
Norm = tuple[torch.Tensor, torch.Tensor | None, float]


class PagedCache(NamedTuple):
    """A paged KV cache: ``k`` and ``v`` are ``(pages, page_size, kv_heads, head_dim)``.

    ``kv_scales`` belongs to an fp8 cache and is None for any other.
    """

    k: torch.Tensor
    v: torch.Tensor
    kv_scales: KvScales | None = None


class CachedSequences(NamedTuple):
    """The sequences in a paged cache.

    Attributes:
        page_table: ``(batch, max_pages)`` int32: the pages of each sequence, in order.
        seq_lens: ``(batch,)`` int32: tokens in each sequence.
        starts: ``(batch,)`` int32: the first token that is attended to; None means token 0.
    """

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor | None = None
