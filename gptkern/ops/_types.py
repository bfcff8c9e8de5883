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


class RmsNorm(NamedTuple):
    """An RMS norm over the last dimension.

    Attributes:
        weight: ``(width,)``.
        eps: Added to the mean square.
        unit_offset: The factors are ``1 + weight``.
    """

    weight: torch.Tensor
    eps: float
    unit_offset: bool = False


class Rotary(NamedTuple):
    """Rotary positions of the newest token of each sequence.

    Attributes:
        cos, sin: ``(context, dim / 2)`` fp32, contiguous: the first ``dim`` elements of a head are turned.
        seq_lens: ``(rows,)`` int32: tokens in each sequence, the newest included, which stands at
            ``seq_lens - 1``.
        pairs: ``halves``: element i turns with ``i + dim / 2``; ``interleaved``: 2 i with 2 i + 1.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    seq_lens: torch.Tensor
    pairs: str = "halves"


class HeadNorm(NamedTuple):
    """An RMS norm of each query head and each key head.

    Attributes:
        q_weight, k_weight: ``(head_dim,)``.
        eps: Added to the mean square.
        unit_offset: The factors are ``1 + weight``.
    """

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float
    unit_offset: bool = False


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
